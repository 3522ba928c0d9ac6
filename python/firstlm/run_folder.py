"""The folder of a training run: what is finished, what can be taken up again, and the log.

runs/x/config.yaml              every setting
runs/x/data.json                hashes of the sets that are no shipped corpora
runs/x/train_log.jsonl          a line per logged step and per evaluation, over all phases
runs/x/control_plan.json, length_plans.json, task_plans.json   plans that were searched or named
runs/x/importance.json          cross-entropy rise of every layer, where it was measured
runs/x/router_init.safetensors  the routers before phase 1
runs/x/lora/start.json          thresholds and keep shares that phase 2 started from
runs/x/<phase>/checkpoint-<n>/  routers, adapter, optimizer, controllers (until the phase is over)
runs/x/<phase>/final/           routers, adapter, phase.json
runs/x/checkpoint/              what firstlm.from_pretrained loads: the end of the last phase
runs/x/result.json, health.*    written last: the run is complete
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firstlm.atomic import check_can_write, staged_folder, write_json, write_text
from firstlm.length_plans import FILE as LENGTH_PLANS
from firstlm.train_config import PHASES, TrainConfig
from firstlm.trainer import latest_checkpoint

_INPUTS = ("config.yaml", "data.json")
_OUTPUTS = (
    "train_log.jsonl", "importance.json", "task_plans.json", "control_plan.json", LENGTH_PLANS,
    "router_init.safetensors", "result.json", "health.json", "health.md",
)  # fmt: skip


class RunFolder:
    """Paths and bookkeeping of one run. Only the main process writes.

    Args:
        path: the run's output_dir.
        writes: whether this process is the one that writes.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool) -> None:
        self.path = Path(path)
        self.writes = writes
        self.log_path = self.path / "train_log.jsonl"
        self.checkpoint = self.path / "checkpoint"

    def open(self, config: TrainConfig, data: Mapping[str, str]) -> dict[str, Any] | None:
        """The result of the run of `config` if it is complete. Nothing is written.

        Only the main process judges: what the others would find depends on how far it has come.

        Args:
            data: set -> hash of its examples, see train_data.hashes_of.

        Raises:
            ValueError: the folder holds a run of other settings or data, or resume is off and it
                holds any, or a config.yaml that no run wrote; it cannot be written to; the run
                would start from what overwrite deletes; or there is no warm-up to take over.
        """
        if self.writes:
            if not self._has_begun():
                self._refuse_to_lose_config()
            elif config.overwrite:
                self._refuse_to_lose_inputs(config)
            else:
                self._check_same_run(config, data)
            self._check_warmup(config, data)
        done = None if config.overwrite else self.read("result.json")
        if self.writes and done is None:
            check_can_write(self.path, folder=True)
        return done

    def begin(self, config: TrainConfig, data: Mapping[str, str]) -> None:
        """Takes up, or starts, the run of `config`, once everything else about it is checked.

        A run that overwrite is to delete goes here, and not before. A warm-up is taken over.
        """
        if not self.writes:
            return
        if config.overwrite and self._has_begun():
            self._delete_run()
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._config.is_file() or TrainConfig.from_yaml(self._config) != config:
            config.to_yaml(self._config)
        if data:
            self.write("data.json", data)
        for partial in self.path.glob("**/.*.partial*"):
            shutil.rmtree(partial, ignore_errors=True)
        if config.warmup_from is not None and not self._has_own_warmup():
            self._take_warmup(RunFolder(config.warmup_from, writes=False))

    @property
    def _config(self) -> Path:
        return self.path / "config.yaml"

    def _has_begun(self) -> bool:
        """A start that ended before anything was made is no run."""
        made = (*PHASES, *_OUTPUTS, "checkpoint")
        return self._config.is_file() and any((self.path / name).exists() for name in made)

    def _check_same_run(self, config: TrainConfig, data: Mapping[str, str]) -> None:
        if not config.resume:
            raise ValueError(
                f"{self.path} holds a run already: set resume=true to go on with it, "
                "overwrite=true to delete it, or choose another output_dir"
            )
        before = self.read("data.json") or {}
        changed = {
            "with other settings": config.difference(TrainConfig.from_yaml(self._config)),
            "on other data": [n for n in data if before.get(n, data[n]) != data[n]],
        }
        for what, names in changed.items():
            if names:
                raise ValueError(
                    f"{self.path} holds a run {what} ({', '.join(names)}): choose another "
                    "output_dir, or set resume=false and overwrite=true to delete it"
                )

    def _refuse_to_lose_config(self) -> None:
        """A config.yaml that is not to the letter what a run writes is the user's own."""
        if not self._config.is_file():
            return
        try:
            ours = TrainConfig.from_yaml(self._config).to_text()
        except ValueError:
            ours = None
        if self._config.read_bytes() != (ours or "").encode():
            raise ValueError(
                f"{self._config} was not written by a run, and one in {self.path} would replace "
                "it: rename that file, or choose another output_dir"
            )

    def _refuse_to_lose_inputs(self, config: TrainConfig) -> None:
        """What this run starts from must not lie in the run that it deletes."""
        run = self.path.resolve()
        gone = [run / name for name in (*PHASES, "checkpoint")]
        for name in ("base", "checkpoint", "warmup_from", "plan_search_common", "control_plan"):
            value = getattr(config, name)
            if not isinstance(value, str):
                continue
            path = Path(value.removeprefix("most_kept:")).resolve()
            if path == run or any(path.is_relative_to(folder) for folder in gone):
                raise ValueError(
                    f"overwrite=true would delete {name}={value}, from which this run is to start: "
                    "choose another output_dir"
                )

    def _delete_run(self) -> None:
        """Removes what a run writes, and nothing else that may lie in its folder.

        result.json goes first and config.yaml last: after a kill in between, what is left is a run
        that is not complete, which the same command deletes.
        """
        for name in ("result.json", *PHASES, "checkpoint", *_OUTPUTS, *reversed(_INPUTS)):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    # ---- the warm-up of another run ----

    def _has_own_warmup(self) -> bool:
        folder = self.phase("warmup")
        # A takeover that was killed leaves an empty one.
        return folder.is_dir() and any(folder.iterdir())

    def _check_warmup(self, config: TrainConfig, data: Mapping[str, str]) -> None:
        """Raises ValueError if the warm-up to be taken over is not whole, or another one."""
        if config.warmup_from is None or (self._has_own_warmup() and not config.overwrite):
            return
        other = RunFolder(config.warmup_from, writes=False)
        if not other._config.is_file() or not other.is_finished("warmup"):
            raise ValueError(f"warmup_from={config.warmup_from}: no run with a finished warm-up")
        changed = config.other_warmup(TrainConfig.from_yaml(other._config))
        if dict(data) != (other.read("data.json") or {}):
            changed.append("its examples")
        if changed:
            raise ValueError(
                f"warmup_from={config.warmup_from}: its warm-up is another one "
                f"({', '.join(changed)})"
            )

    def _take_warmup(self, other: RunFolder) -> None:
        if (importance := other.read("importance.json")) is not None:
            self.write("importance.json", importance)
        phase = other.finished_phase("warmup")
        shutil.copyfile(other.log_path, self.log_path)
        self.rewind_log("warmup", phase["steps"])
        with staged_folder(self.final("warmup")) as staging:
            shutil.copytree(other.final("warmup"), staging, dirs_exist_ok=True)
            own = {"checkpoint": str(self.final("warmup"))}
            write_json(staging / "phase.json", phase | own)

    # ---- phases ----

    def phase(self, name: str) -> Path:
        return self.path / name

    def final(self, name: str) -> Path:
        return self.path / name / "final"

    def is_finished(self, name: str) -> bool:
        return (self.final(name) / "phase.json").is_file()

    def finished_phase(self, name: str) -> dict[str, Any]:
        return self.read(f"{name}/final/phase.json") or {}

    def resumable(self, name: str) -> Path | None:
        """The newest whole checkpoint of an unfinished phase."""
        return latest_checkpoint(self.phase(name))

    def clear_checkpoints(self, name: str) -> None:
        """Removes what only resuming needed, once a phase is finished."""
        if self.writes:
            for folder in self.phase(name).glob("checkpoint-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run, or None."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, name: str, value: Any) -> None:
        if self.writes:
            write_json(self.path / name, value)

    # ---- the log ----

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line to train_log.jsonl."""
        if self.writes:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def rewind_log(self, phase: str, step: int) -> None:
        """Drops lines that a resumed run will write again, and a line cut short by a kill."""
        if not self.writes or not self.log_path.is_file():
            return
        later = PHASES[PHASES.index(phase) + 1 :]
        kept = []
        for line in self.log_path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record["phase"] in later or (record["phase"] == phase and record["step"] > step):
                continue
            kept.append(line + "\n")
        write_text(self.log_path, "".join(kept))
