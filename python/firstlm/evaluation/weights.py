"""The weights that a group of methods shares, and the paths that run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstlm import decode_paths, loading
from firstlm.budget import calibrate_thresholds, rate_key
from firstlm.checkpoint import read_router_config
from firstlm.decode_paths import DecodePath
from firstlm.engine.source import source_folders, source_key
from firstlm.evaluation.records import Method

if TYPE_CHECKING:
    from firstlm.evaluation.run import Run


class Weights:
    """The weights of a group of methods, loaded when they are first needed.

    Attributes:
        folder: of the checkpoint, or of one whose base this is.
        key: changes when the files do.
        quality_key: what figures of quality depend on beside the plans.
        thresholds: found ones, by rate.
    """

    def __init__(self, run: Run, method: Method) -> None:
        self._run, self._method = run, method
        folder = method.checkpoint or next(m.checkpoint for m in run.methods if m.checkpoint)
        assert folder is not None
        self.folder, self._is_base = folder, method.weights == "base"
        folders = source_folders(folder)
        self.key = source_key(folders[1:] if self._is_base else folders)
        config = read_router_config(Path(folder))
        assert config.num_layers is not None
        self.num_layers = config.num_layers
        self._config = config.resolved(config.num_layers)
        self.protected = self._config.protected
        request = run.request
        self.quality_key = {
            "engine": request.engine,
            "precision": request.precision if request.engine != "hf" else None,
            "dtype": str(request.dtype),
            "batch_size": run.effort.batch_size,
            "prefill": config.prefill,
        }
        self.thresholds: dict[float, list[float]] = {}
        self._model: Any = None
        self._path: DecodePath | None = None

    @property
    def model(self) -> Any:
        if self._model is None:
            options = {"adapter": False} if self._is_base else {"merge_adapter": True}
            model = loading.from_pretrained(self.folder, dtype=self._run.request.dtype, **options)
            self._model = model.to(self._run.state.device)
        return self._model

    @property
    def path(self) -> DecodePath:
        """What quality is measured on."""
        if self._path is None:
            request = self._run.request
            model, is_hf = self.model, request.engine == "hf"
            if not is_hf:
                self._find_all_thresholds()
            self._path = decode_paths.open_path(
                model, self._run.tokenizer, request.engine,
                None if is_hf else request.precision, None, self._run.threads, self._run.show,
            )  # fmt: skip
        return self._path

    def timing_path(self, group: Sequence[Method]) -> DecodePath:
        """What latency is measured on."""
        request = self._run.request
        kind = request.timing_engine
        assert kind is not None
        for rate, thresholds in self.thresholds.items():
            self.use_thresholds(rate, thresholds)
        if self._path is not None and self._path.facts["engine"] == "native" and kind != "hf":
            return self._path
        return decode_paths.open_path(
            self.model, self._run.tokenizer, kind,
            None if kind == "hf" else request.precision, None, self._run.threads, self._run.show,
        )  # fmt: skip

    def _find_all_thresholds(self) -> None:
        """An engine keeps the thresholds that the model has when it is made."""
        for method in self._run.methods:
            own = method.checkpoint == self._method.checkpoint
            if own and (method.name, method.weights) == ("first", "first"):
                self.use_thresholds(method.skip_rate_asked, None)

    def use_thresholds(self, rate: float, found: list[float] | None) -> list[float]:
        """Makes `budget=rate` mean thresholds of that rate: found ones, the checkpoint's own, or
        new ones from validation examples."""
        model = self.model
        known = found or self.thresholds.get(rate) or self._config.calibration.get(rate_key(rate))
        if known is None:
            prompts = [example.prompt_ids for example in self._run.data.validation]
            with self._run.bar(f"thresholds for {rate:g}: prompts", None) as update:
                known = calibrate_thresholds(model, prompts, [rate], prompts_done=update)[
                    rate_key(rate)
                ]
        known = list(known)
        for layer in self.protected:  # so that they are kept where any plan is allowed, too
            known[layer] = 0.0
        self.thresholds[rate] = known
        config = model.router_config
        model.router_config = dataclasses.replace(
            config, calibration={**config.calibration, rate_key(rate): known}
        )
        return known
