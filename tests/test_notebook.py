"""The notebook runs from its first cell to its last, on a tiny model and budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_gguf import tiny_model_folder

nbclient = pytest.importorskip("nbclient", reason="pip install 'firstlm[notebook]'")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


def test_the_notebook_runs_and_shows_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRSTLM_NOTEBOOK", "tiny")
    base = tiny_model_folder(tmp_path, layers=6, context=1024)
    monkeypatch.setenv("FIRSTLM_NOTEBOOK_BASE", str(base))
    monkeypatch.setenv("FIRSTLM_NOTEBOOK_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    text = "".join(o.get("text", "") for o in outputs if o["output_type"] == "stream")
    assert text.count("tokens/s") == 3 and "▮" in text
    assert any("All methods" in o.get("data", {}).get("text/markdown", "") for o in outputs)


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
