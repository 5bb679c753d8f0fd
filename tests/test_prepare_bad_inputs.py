"""All kinds of bad data: one line that names file, line and remedy; nothing is written."""

import pytest
from bad_inputs import BAD_INPUTS
from prepare_folder import make_folder

from stages import prepare
from stages.shared.process import StageError


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_bad_input_is_refused_in_one_line(bad, tmp_path, monkeypatch):
    make_folder(tmp_path, {bad.file: bad.content()}, **bad.params)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError) as caught:
        prepare.main()
    message = str(caught.value)
    assert bad.message in message
    assert "\n" not in message
    assert len(message) < 500
    assert not (tmp_path / "data/prepared").exists()
    assert not (tmp_path / "metrics").exists()
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["raw"]
