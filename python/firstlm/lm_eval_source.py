"""Tasks of lm-evaluation-harness as examples, each a prompt and the answer that the task wants.

    load_corpus("lm-eval:arc_easy", "test")
    load_corpus("lm-eval:tasks/firstlm_synopsis.yaml", "test")    # a task of one's own

The prompt is the task's `doc_to_text` without few-shot examples, the answer its `doc_to_target`: of
multiple choice the right one, of several right answers the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import datasets

PREFIX = "lm-eval:"
_LENT = 4  # one example in so many, where a task has none to validate on


def is_task(source: Any) -> TypeGuard[str]:
    """Whether a corpus is named in this way."""
    return isinstance(source, str) and source.startswith(PREFIX)


def load_task(source: str) -> datasets.DatasetDict:
    """The examples of a task.

    Args:
        source: `lm-eval:` and the name of a task, or the path of its YAML file, which may name
            other files of its folder.

    Returns:
        "test", which the harness would measure on; "validation" and "train" as the task has them.
        Without validation examples a quarter of the training examples, or else of the test's.

    Raises:
        ValueError: no such task, a group of tasks, or one whose prompts or answers are no text.
    """
    import datasets

    task = _find(source.removeprefix(PREFIX), source)
    parts = {"train": task.has_training_docs, "validation": task.has_validation_docs}
    documents = {
        split: list(getattr(task, _DOCUMENTS[split])()) for split, has in parts.items() if has()
    }
    if task.has_test_docs():
        documents["test"] = list(task.test_docs())
    else:
        documents["test"] = documents.pop("validation")
    if "validation" not in documents:
        documents |= _with_validation(documents)
    name = task.config.task
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(list(_rows(task, found, source, f"{name}/{split}")))
            for split, found in documents.items()
        }
    )


_DOCUMENTS = {"train": "training_docs", "validation": "validation_docs"}


def _find(name: str, source: str) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        from firstlm.lm_eval_command import INSTALL

        raise ValueError(f"{source}: {INSTALL} ({error})") from error
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        name = _name_in(path, source)
        manager = TaskManager(include_path=str(path.parent.resolve()), include_defaults=False)
    else:
        manager = TaskManager()
    if name in manager.all_subtasks:
        # Every lm-eval that we support has this loader; later ones call it their old one.
        return manager.load_task_or_group([name])[name]
    if name in manager.all_tasks:
        raise ValueError(f"{source} is a group of tasks: name one of them")
    raise ValueError(f"{source}: lm-eval has no task {name!r}")


def _name_in(path: Path, source: str) -> str:
    """What a YAML file calls its task. Functions in it are only lm-eval's to load."""
    if not path.is_file():
        raise ValueError(f"{source}: there is no file {path}")
    found = re.search(r"^task:\s*['\"]?([^\s'\"]+)", path.read_text(encoding="utf-8"), re.M)
    if found is None:
        raise ValueError(f"{source}: the file names no task")
    return found[1]


def _with_validation(documents: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    lender = "train" if "train" in documents else "test"
    found = documents[lender]
    return {
        "validation": found[::_LENT],
        lender: [document for i, document in enumerate(found) if i % _LENT],
    }


def _rows(task: Any, documents: Iterable[Any], source: str, where: str) -> Iterable[dict[str, str]]:
    for number, document in enumerate(documents):
        prompt, answer = task.doc_to_text(document), _answer(task, document)
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise ValueError(f"{source}: this task has no single text as a prompt and an answer")
        yield {
            "id": f"{where}/{number}",
            "task": task.config.task,
            "prompt": prompt.strip(),
            "answer": answer.strip(),
        }


def _answer(task: Any, document: Any) -> Any:
    target = task.doc_to_target(document)
    if isinstance(target, list):
        target = target[0] if target else None
    if isinstance(target, int) and task.OUTPUT_TYPE == "multiple_choice":
        return task.doc_to_choice(document)[target]
    return target
