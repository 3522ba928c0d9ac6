"""The folder of a training run: what is finished, what can be taken up again, and the log.

runs/x/config.yaml              every setting
runs/x/data.json                hashes of the sets that are no shipped corpora
runs/x/train_log.jsonl          a line per logged step and per evaluation, over all phases
runs/x/control_plan.json, length_plans.json, task_plans.json   plans that were searched or named
runs/x/importance.json          cross-entropy rise of every layer, where it was measured
runs/x/router_init.safetensors  the routers before phase 1
runs/x/<phase>/start.json       thresholds and keep shares that the phase started from
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

from firstlm.atomic import staged_folder, write_json, write_text
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

    def open(self, config: TrainConfig, data: Mapping[str, str]) -> None:
        """Takes up, or starts, the run of `config`. Only the main process looks and judges: what
        the others would find depends on how far it has come.

        Args:
            data: set -> hash of its examples, see train_data.hashes_of.

        Raises:
            ValueError: the folder holds a run of other settings or data, or resume is off and it
                holds any. A start that failed before anything was made is no run.
        """
        if not self.writes:
            return
        stored = self.path / "config.yaml"
        if config.overwrite and stored.is_file():
            self._delete_run()
        if stored.is_file() and self._has_begun():
            if not config.resume:
                raise ValueError(
                    f"{self.path} holds a run already: set resume=true to go on with it, "
                    "overwrite=true to delete it, or choose another output_dir"
                )
            changed = config.difference(TrainConfig.from_yaml(stored))
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with other settings ({', '.join(changed)}): choose "
                    "another output_dir, or set resume=false and overwrite=true to delete it"
                )
            before = self.read("data.json") or {}
            changed = [name for name in data if before.get(name, data[name]) != data[name]]
            if changed:
                raise ValueError(
                    f"{self.path} holds a run on other data ({', '.join(changed)}): choose "
                    "another output_dir, or set resume=false and overwrite=true to delete it"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        config.to_yaml(stored)
        if data:
            self.write("data.json", data)
        for partial in self.path.glob("**/.*.partial*"):
            shutil.rmtree(partial, ignore_errors=True)

    def take_warmup(self, config: TrainConfig) -> None:
        """Takes over the warm-up of `config.warmup_from`, unless this run has begun its own.

        Raises:
            ValueError: that run has not finished one, or one of other settings or data.
        """
        folder = self.phase("warmup")
        # A takeover that was killed leaves an empty one.
        begun = folder.is_dir() and any(folder.iterdir())
        if config.warmup_from is None or not self.writes or begun:
            return
        other = RunFolder(config.warmup_from, writes=False)
        if not (other.path / "config.yaml").is_file() or not other.is_finished("warmup"):
            raise ValueError(f"warmup_from={config.warmup_from}: no run with a finished warm-up")
        changed = config.other_warmup(TrainConfig.from_yaml(other.path / "config.yaml"))
        if self.read("data.json") != other.read("data.json"):
            changed.append("its examples")
        if changed:
            raise ValueError(
                f"warmup_from={config.warmup_from}: its warm-up is another one "
                f"({', '.join(changed)})"
            )
        if (importance := other.read("importance.json")) is not None:
            self.write("importance.json", importance)
        phase = other.finished_phase("warmup")
        shutil.copyfile(other.log_path, self.log_path)
        self.rewind_log("warmup", phase["steps"])
        with staged_folder(self.final("warmup")) as staging:
            shutil.copytree(other.final("warmup"), staging, dirs_exist_ok=True)
            own = {"checkpoint": str(self.final("warmup"))}
            write_json(staging / "phase.json", phase | own)

    def _has_begun(self) -> bool:
        return any((self.path / name).exists() for name in (*PHASES, *_OUTPUTS, "checkpoint"))

    def _delete_run(self) -> None:
        """Removes what a run writes, and nothing else that may lie in its folder."""
        for name in (*PHASES, "checkpoint"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (*_INPUTS, *_OUTPUTS):
            (self.path / name).unlink(missing_ok=True)

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
