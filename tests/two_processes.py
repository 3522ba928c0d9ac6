"""Run by torchrun from test_trainer.py: phases 1 and 2 on 2 processes of 4 sequences each."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from test_trainer import Gradients, lora_phase, router_phase
from tiny_training import make_trainer, model_with_adapter


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, phase in (("routers", router_phase()), ("lora", lora_phase())):
        recorder = Gradients()
        trainer = make_trainer(
            model_with_adapter(), phase, folder / f"two-{name}", batch_size=4, callbacks=[recorder]
        )
        assert trainer.args.world_size == 2
        trainer.train()
        if trainer.args.process_index == 0:
            found = {
                "gradients": recorder.steps,
                "alpha": phase.multiplier.alpha,
                "thresholds": trainer.model.router_config.thresholds,
                "log": trainer.state.log_history,
            }
            torch.save(found, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()  # its threads would else be there at the exit


if __name__ == "__main__":
    main(Path(sys.argv[1]))
