import jax
import pytest
from etils.epath import Path

from tinymim_jax.runtime import program_cache


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """What JAX is told, without its being told."""
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return told


def test_one_process_keeps_programs_for_all_workdirs_of_its_user(settings, tmp_path):
    program_cache.keep(Path(tmp_path / "work"))
    first = dict(settings)
    program_cache.keep()
    assert settings == first and Path(first["jax_compilation_cache_dir"]).parent == Path(tmp_path / "cache/tinymim_jax")
    assert first["jax_compilation_cache_max_size"] == program_cache.MAX_BYTES


@pytest.mark.parametrize("why", ["several processes", "bucket", "no home"])
def test_otherwise_programs_lie_in_the_workdir(why, settings, tmp_path, monkeypatch):
    workdir = Path("gs://bucket/run" if why == "bucket" else tmp_path / "work")
    if why == "several processes":
        monkeypatch.setattr(jax, "process_count", lambda: 2)
    if why == "no home":
        (tmp_path / "cache").write_text("a file")
    program_cache.keep(workdir)
    assert settings["jax_compilation_cache_dir"] == f"{workdir}/jax_cache"
    assert settings["jax_compilation_cache_max_size"] == -1


def test_a_variable_goes_before(settings, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    program_cache.keep(Path("/work"))
    assert settings == {}
