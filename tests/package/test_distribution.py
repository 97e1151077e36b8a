"""What is built can be installed and run somewhere else."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.package
ROOT = Path(__file__).parents[2]
MAIN_JOB = ["lox", "demo:base", "demo:aligned", "--rank", "6", "--alpha", "1.5", "-o", "out"]


def run(*words, cwd, **options):
    """Run a program that must succeed, outside the checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=600,
        **options,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and a source distribution, built from a copy of the files git knows."""
    work = tmp_path_factory.mktemp("build")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            target = work / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", work / "dist", work / "source", cwd=work)
    [wheel], [sdist] = (work / "dist").glob("*.whl"), (work / "dist").glob("*.tar.gz")
    return wheel, sdist


def new_environment(folder, *, dependencies):
    """A virtual environment; its dependencies are those of this one, so that only our package is new."""
    run(sys.executable, "-m", "venv", folder, cwd="/")
    if dependencies:
        [site] = folder.glob("lib/python*/site-packages")
        # A path line brings packages, not the editable install whose .pth file lies beside them.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def expected_modules():
    mapped = {"surgery": "surgery", "cli": "surgery/cli", "kernels/ops": "surgery/kernels"}
    for source, target in mapped.items():
        for file in sorted((ROOT / source).rglob("*.py")):
            yield f"{target}/{file.relative_to(ROOT / source)}"


def test_the_wheel_holds_every_module_and_the_embedded_pair(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = set(archive.namelist())
    assert set(expected_modules()) <= names
    for side in ("base", "aligned"):
        for file in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
            assert f"surgery/demo/{side}/{file}" in names
    assert "surgery/py.typed" in names
    assert any(name.startswith("surgery/demo/data/") for name in names)
    assert not any(name.startswith(("tests/", "cli/", "kernels/")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_what_a_build_needs(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "cli/app.py", "kernels/ops/philox.py"} <= names
    assert "surgery/demo/base/model.safetensors" in names


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_an_install_outside_the_checkout_runs_the_main_job(built, tmp_path, kind):
    programs = new_environment(tmp_path / "env", dependencies=True)
    source = {"wheel": [built[0]], "sdist": [built[1]], "editable": ["--editable", ROOT]}[kind]
    run(programs / "python", "-m", "pip", "install", "-q", "--no-deps", *source, cwd=tmp_path)
    where = run(
        programs / "python", "-c", "import surgery.cli; print(surgery.cli.__file__)", cwd=tmp_path
    ).strip()
    assert Path(where).is_relative_to(ROOT if kind == "editable" else tmp_path)
    assert "Low-rank extrapolation" in run(programs / "surgery", "--help", cwd=tmp_path)
    summary = run(programs / "surgery", *MAIN_JOB, cwd=tmp_path)
    assert "W = W_aligned + 1.5 * P_6(W_aligned - W_base)" in summary
    assert (tmp_path / "out/surgery.json").is_file()
    run(programs / "surgery", "verify", "out", "--recompute", cwd=tmp_path)


def test_from_the_root_of_the_checkout_nothing_is_shadowed():
    code = "import transformers.modeling_utils, sys; assert 'kernels.ops' not in sys.modules; import surgery.kernels"
    run(sys.executable, "-W", "error::ImportWarning", "-c", code, cwd=ROOT)


@pytest.mark.nightly
def test_a_fresh_install_brings_all_dependencies(built, tmp_path):
    programs = new_environment(tmp_path / "env", dependencies=False)
    constraints = ROOT / ".ci/constraints.txt"
    run(programs / "python", "-m", "pip", "install", "-q", "-c", constraints, "torch", cwd=tmp_path)
    run(programs / "python", "-m", "pip", "install", "-q", "-c", constraints, built[0], cwd=tmp_path)
    run(programs / "python", "-m", "pip", "check", cwd=tmp_path)
    run(programs / "surgery", *MAIN_JOB, cwd=tmp_path)
