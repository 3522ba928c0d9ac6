"""What counts as prompt: the tokens that the routers read. Letters: B sequences, T tokens."""

from __future__ import annotations

import torch


def default_prompt_mask(
    tokens: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None
) -> torch.Tensor:
    """What counts as prompt, bool `[B, T]`: unmasked tokens, before the first label if any.

    Args:
        tokens: `[B, T]` ids or `[B, T, D]` embeddings.
        attention_mask: `[B, T]` or None.
        labels: `[B, T]`, -100 on the prompt, or None.

    Raises:
        ValueError: an attention mask that is not `[B, T]`.
    """
    shape = tokens.shape[:2]
    if attention_mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    elif attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must be {list(shape)} for the routers to know the prompt, got "
            f"{list(attention_mask.shape)}; pass prompt_mask with other masks"
        )
    else:
        mask = attention_mask.to(torch.bool)
    if labels is None:
        return mask
    answered = (labels != -100).cumsum(1) > 0  # [B, T]
    return mask & ~answered.to(mask.device)


def check_labels_leave_a_prompt(
    prompt_mask: torch.Tensor, attention_mask: torch.Tensor | None
) -> None:
    """Raises ValueError if labels have made an answer of all that a sequence holds.

    Args:
        prompt_mask: bool `[B, T]`, of `default_prompt_mask`.
        attention_mask: `[B, T]` or None.
    """
    unread = ~prompt_mask.any(1)  # [B]
    if attention_mask is not None:
        unread &= attention_mask.to(unread.device, torch.bool).any(1)
    if bool(unread.any()):
        row = int(unread.nonzero()[0])
        raise ValueError(
            f"labels leave sequence {row} no prompt for the routers to read: set them to -100 on "
            "the prompt, or pass prompt_mask (attention_mask.bool() for all tokens) or skip_plan"
        )


def check_one_document_a_row(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> None:
    """Raises ValueError for packed rows: a row has one plan, of one prompt.

    Args:
        position_ids: `[B, T]`, counting from 0 where a document starts.
        attention_mask: `[B, T]` or None.
    """
    if position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return
    restarts = position_ids[:, 1:] == 0  # [B, T - 1]
    if (
        isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    ):  # padding is at 0, too
        mask = attention_mask[:, -position_ids.shape[1] :].to(restarts.device, torch.bool)
        restarts = restarts & mask[:, 1:] & mask[:, :-1]
    if bool(restarts.any()):
        raise ValueError(
            "position_ids start anew within a row: packed documents would share the plan of the "
            "first one's prompt; give each a row of its own, or pass skip_plan"
        )


def mask_of_padding(
    input_ids: torch.Tensor, pad_token_id: int | None, eos_token_id: int | list[int] | None
) -> torch.Tensor | None:
    """The mask `[B, T]` that transformers' generate takes where none is given.

    Returns:
        None (all tokens count) where there is no padding, or padding cannot be told from the end of
        a sequence.
    """
    ends = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    if pad_token_id is None or pad_token_id in ends or input_ids.ndim != 2:
        return None
    mask = input_ids != pad_token_id
    return None if bool(mask.all()) else mask.long()


def position_ids_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions of the unmasked tokens, `[B, T]`, as transformers' generate counts them."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
