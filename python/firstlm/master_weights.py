"""Float32 copies of what a 16-bit model learns: its optimizer steps them, the model rounds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_KEY = "master_weights"


class MasterWeights:
    """Master copies of 16-bit parameters (Micikevicius et al., arXiv 1710.03740, section 3.1).

    A bfloat16 weight has 8 significant bits: it loses any update below 1/512 of itself, and the
    second moment of Adam, which moves by a thousandth a step, stands still. Copies that are stepped
    in float32 have neither trouble, and the model computes in 16 bits as before.

    Args:
        parameters: of any dtype; those of 16 bits get a copy.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._masters = {
            p: torch.nn.Parameter(p.detach().to(torch.float32))
            for p in parameters
            if p.dtype in (torch.bfloat16, torch.float16)
        }

    def of(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        """The copy that the optimizer is to be given; the parameter itself if it has none."""
        return self._masters.get(parameter, parameter)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's steps read gradients from, and write weights to, the model.

        Its state_dict holds the copies, so a resumed run goes on from unrounded weights.
        """
        if self._masters:
            optimizer.register_step_pre_hook(self._take_gradients)
            optimizer.register_step_post_hook(self._give_weights)
            optimizer.register_state_dict_post_hook(self._save)
            optimizer.register_load_state_dict_pre_hook(self._load)

    def _take_gradients(self, *_: Any) -> None:
        for parameter, master in self._masters.items():
            grad = parameter.grad
            master.grad = None if grad is None else grad.to(master.dtype)

    @torch.no_grad()
    def _give_weights(self, *_: Any) -> None:
        for parameter, master in self._masters.items():
            parameter.copy_(master)
            master.grad = None

    def _save(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state[_KEY] = [master.detach() for master in self._masters.values()]

    @torch.no_grad()
    def _load(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        for master, saved in zip(self._masters.values(), state[_KEY], strict=True):
            master.copy_(saved)
