"""The router: scores one decoder layer for one sequence from the prompt's hidden states.

FiRST (arXiv 2410.12513), section 3: masked mean over the prompt, linear, sigmoid. The paper leaves
pooling details, thresholds, protected layers and the initial bias open; the defaults are ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from firstlm import ops

POOLINGS = ("mean", "windowed_mean", "last")
HEADS = ("linear", "mlp")
PREFILLS = ("route", "full")
_FORMAT_VERSION = 1
NORM_EPS = 1e-6


def _require(condition: bool, name: str, value: Any, accepted: str) -> None:
    if not condition:
        raise ValueError(f"RouterConfig.{name} must be {accepted}, got {value!r}")


@dataclass
class RouterConfig:
    """Everything about the routers of a model but their weights; saved as `router_config.json`.

    Args:
        pooling: how the prompt's states become one vector: "mean", "windowed_mean" (the prompt in
            `windows` equal parts, their means concatenated) or "last" (last prompt token).
        windows: number of windows of "windowed_mean".
        head: "linear" (the paper) or "mlp" (bottleneck of `bottleneck` units, SiLU).
        bottleneck: width of the "mlp" head.
        normalize: RMS-normalise the pooled vector before the head. Off in the paper; without it the
            step of the logit grows with the norm of the hidden states.
        prefill: "route": router l reads states that the skips before it have shaped, and the prompt
            skips too; "full": the prompt runs through every layer, the answer skips.
        keep_bias: initial bias of the keep logit, one number or one a layer.
        protected: layers that are always kept; negative indices count from the end.
        thresholds: keep iff keep_prob >= threshold; one number or one a layer.
        calibration: asked skip rate (as text, "0.30") -> thresholds that gave it on held-out data.
        choice: how `firstlm calibrate` chose the thresholds: what was asked and what was measured.
        base_model_name_or_path, base_revision, base_config_sha256, num_layers: the base model,
            filled in when the routers are attached.
    """

    pooling: str = "mean"
    windows: int = 1
    head: str = "linear"
    bottleneck: int = 64
    normalize: bool = True
    prefill: str = "route"
    keep_bias: float | list[float] = 2.0
    protected: list[int] = field(default_factory=lambda: [0, 1, -1])
    thresholds: float | list[float] = 0.5
    calibration: dict[str, list[float]] = field(default_factory=dict)
    choice: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_config_sha256: str | None = None
    num_layers: int | None = None
    version: int = _FORMAT_VERSION

    def __post_init__(self) -> None:
        _require(self.pooling in POOLINGS, "pooling", self.pooling, f"one of {POOLINGS}")
        _require(self.head in HEADS, "head", self.head, f"one of {HEADS}")
        _require(self.prefill in PREFILLS, "prefill", self.prefill, f"one of {PREFILLS}")
        _require(self.windows >= 1, "windows", self.windows, "at least 1")
        _require(
            self.pooling == "windowed_mean" or self.windows == 1,
            "windows",
            self.windows,
            '1 unless pooling is "windowed_mean"',
        )
        _require(self.bottleneck >= 1, "bottleneck", self.bottleneck, "at least 1")
        _require(
            self.version == _FORMAT_VERSION,
            "version",
            self.version,
            f"{_FORMAT_VERSION} to be read",
        )

    def resolved(self, num_layers: int) -> RouterConfig:
        """This config for a model of `num_layers` layers: per-layer lists, indices >= 0.

        Raises:
            ValueError: a list or an index that does not fit the model.
        """

        def per_layer(name: str) -> list[float]:
            value = getattr(self, name)
            values = [float(value)] * num_layers if isinstance(value, (int, float)) else list(value)
            _require(
                len(values) == num_layers, name, value, f"one number or {num_layers} (one a layer)"
            )
            return [float(v) for v in values]

        _require(
            self.num_layers in (None, num_layers),
            "num_layers",
            self.num_layers,
            f"{num_layers}, the model's number of decoder layers",
        )
        _require(
            all(-num_layers <= layer < num_layers for layer in self.protected),
            "protected",
            self.protected,
            f"layers of a model of {num_layers}",
        )
        for rate, thresholds in self.calibration.items():
            _require(
                len(thresholds) == num_layers,
                f"calibration[{rate!r}]",
                thresholds,
                f"{num_layers} thresholds",
            )
        return dataclasses.replace(
            self,
            keep_bias=per_layer("keep_bias"),
            thresholds=per_layer("thresholds"),
            protected=sorted({layer % num_layers for layer in self.protected}),
            num_layers=num_layers,
        )

    def thresholds_for(self, skip_rate: float) -> list[float]:
        """The calibrated thresholds of an asked average skip rate.

        Between two calibrated rates the logits of the thresholds are interpolated.

        Raises:
            ValueError: no calibration, or a rate outside of the calibrated range.
        """
        table = sorted((float(rate), thresholds) for rate, thresholds in self.calibration.items())
        if not table or not table[0][0] - 1e-9 <= skip_rate <= table[-1][0] + 1e-9:
            known = ", ".join(f"{rate:g}" for rate, _ in table) or "none"
            raise ValueError(
                f"no thresholds are calibrated for a skip rate of {skip_rate} (calibrated: "
                f'{known}); calibrate on held-out prompts, or ask for budget_mode="exact" '
                "(--budget-mode exact)"
            )
        rates = [rate for rate, _ in table]
        after = min(range(len(rates)), key=lambda i: (rates[i] < skip_rate - 1e-9, rates[i]))
        before = max(after - 1, 0)
        if abs(rates[after] - skip_rate) <= 1e-9 or before == after:
            return list(table[after][1])
        share = (skip_rate - rates[before]) / (rates[after] - rates[before])
        low, high = (
            torch.tensor(table[i][1], dtype=torch.float64).logit(eps=1e-9) for i in (before, after)
        )
        return torch.sigmoid(torch.lerp(low, high, share)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types; without a choice, of what earlier releases read too."""
        values = dataclasses.asdict(self)
        if self.choice is None:
            del values["choice"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RouterConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown key (the near miss is named) or a value that is not accepted.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {known}"
                raise ValueError(f"unknown RouterConfig key {key!r}{hint}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> RouterConfig:
        """Read a `router_config.json`.

        Raises:
            ValueError: the file is not JSON or not a router config.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return cls.from_dict(values)


def differences(asked: RouterConfig, own: RouterConfig) -> list[str]:
    """What `asked` wants otherwise than trained routers are: "prefill='full' (theirs: 'route')".

    Args:
        asked: maybe not resolved.
        own: of a checkpoint. Biases and thresholds, which training changes, are not looked at.
    """
    names = ["pooling", "windows", "head", "normalize", "prefill", "protected"]
    if asked.head == own.head == "mlp":
        names.append("bottleneck")
    if own.num_layers is not None:
        protected = sorted({layer % own.num_layers for layer in asked.protected})
        asked = dataclasses.replace(asked, protected=protected)
    return [
        f"{name}={getattr(asked, name)!r} (theirs: {getattr(own, name)!r})"
        for name in names
        if getattr(asked, name) != getattr(own, name)
    ]


def warn_of_other_prefill(trained: str | None, prefill: str, stacklevel: int) -> None:
    """Warns if routers were trained with another prefill; fresh ones (None) were with none."""
    if trained not in (None, prefill):
        warnings.warn(
            f"the routers were trained with prefill={trained!r}; under prefill={prefill!r} they "
            "read other states, and their thresholds may not hold",
            stacklevel=stacklevel,
        )


class Router(nn.Module):
    """The router of one layer. Its parameters are plain float32 `nn.Parameter`s.

    Shapes, with F = D ("mean", "last") or windows·D and H = bottleneck: linear head
    `weight [1, F]`, `bias [1]`; mlp head `weight [H, F]`, `bias [H]`, `out_weight [1, H]`,
    `out_bias [1]`.

    Args:
        config: resolved for the model (`RouterConfig.resolved`).
        hidden_size: D.
        layer_idx: the layer that this router decides.
        device: where the parameters live.
    """

    def __init__(
        self,
        config: RouterConfig,
        hidden_size: int,
        layer_idx: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.pooling, self.windows = config.pooling, config.windows
        self.norm_eps = NORM_EPS if config.normalize else 0.0
        features = hidden_size * config.windows
        units = config.bottleneck if config.head == "mlp" else 1
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.weight = nn.Parameter(torch.empty(units, features, **options))  # [1 | H, F]
        self.bias = nn.Parameter(torch.empty(units, **options))  # [1 | H]
        if config.head == "mlp":
            self.out_weight = nn.Parameter(torch.empty(1, units, **options))  # [1, H]
            self.out_bias = nn.Parameter(torch.empty(1, **options))  # [1]
        else:
            self.register_parameter("out_weight", None)
            self.register_parameter("out_bias", None)
        assert isinstance(config.keep_bias, list)
        self.reset_parameters(config.keep_bias[layer_idx])

    @torch.no_grad()
    def reset_parameters(self, keep_bias: float) -> None:
        """Zero output weights and a bias of `keep_bias`, so that every prompt starts alike."""
        if self.out_weight is None:
            self.weight.zero_()
            self.bias.fill_(keep_bias)
        else:
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)
            self.bias.zero_()
            self.out_weight.zero_()
            self.out_bias.fill_(keep_bias)

    def forward(self, hidden_states: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
        """Score the layer.

        Args:
            hidden_states: `[B, T, D]`, the states that enter the layer.
            prompt_mask: bool `[B, T]`, true for the tokens of the prompt.

        Returns:
            The keep logit, `[B]`, float32 (float64 for float64 states).
        """
        return ops.router_score(
            *self._of_device(hidden_states, prompt_mask),
            self.weight,
            self.bias,
            self.out_weight,
            self.out_bias,
            self.norm_eps,
            self.pooling,
            self.windows,
        )

    def pool(self, hidden_states: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
        """What the head reads before it normalises: `[B, F]`."""
        return ops.router_pool(
            *self._of_device(hidden_states, prompt_mask), self.pooling, self.windows
        )

    def _of_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.to(self.weight.device) for tensor in tensors]

    def extra_repr(self) -> str:
        weight = list(self.weight.shape)
        return f"layer_idx={self.layer_idx}, pooling={self.pooling!r}, weight={weight}"
