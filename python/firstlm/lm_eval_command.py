"""`firstlm lm-eval`: the command of lm-evaluation-harness, which knows our model by then."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from unittest import mock

INSTALL = "lm-evaluation-harness is not installed: pip install 'firstlm[eval]'"


def run(arguments: Sequence[str]) -> None:
    """Runs lm-eval's command line.

    Raises:
        ValueError: lm-eval is not installed, or not all of it.
        SystemExit: as lm-eval ends.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ValueError(f"{INSTALL} ({error})") from error
    import firstlm.lm_eval_model  # noqa: F401  registers "firstlm"

    with mock.patch.object(sys, "argv", ["firstlm lm-eval", *arguments]):
        cli_evaluate()
