"""One-command habits, in the environment that is active: `pip install -e ".[dev]"`, then `nox`."""

from __future__ import annotations

import tempfile

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]

ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, or some: `nox -s tests -- -k step`."""
    session.run("python", "-m", "pytest", *session.posargs, env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Form, the floors between the rooms, types."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Pages into docs/_build; warnings are errors, examples and the gallery run, a browser looks at all of them."""
    examples = ("--doctest-plus", "--doctest-modules", "--doctest-glob", "*.rst")
    session.run("python", "-m", "pytest", "-q", *examples, "linattn", "docs", env=ONE_THREAD)
    session.run("python", "-m", "sphinx", "-W", "-q", "docs", "docs/_build")
    session.run("python", "scripts/check_site.py", "docs/_build")


@nox.session
def measure(session: nox.Session) -> None:
    """The tables of measured errors and times in docs/measured."""
    session.run("python", "scripts/measure_docs.py", *session.posargs, env=ONE_THREAD)


@nox.session
def audit(session: nox.Session) -> None:
    """Every mechanism against its error bound, into the tables of docs/audit; with arguments, the command itself."""
    files = ("--json", "docs/measured/audit.json", "--md", "docs/measured/audit.rst", "--peers")
    session.run("python", "-m", "linattn", "audit", *(session.posargs or files), env=ONE_THREAD)


@nox.session
def mutants(session: nox.Session) -> None:
    """Faults of one line in the real code, each of which a named test must find; with arguments, some of them."""
    session.run("python", "scripts/mutate.py", *session.posargs, env=ONE_THREAD)


@nox.session
def bench(session: nox.Session) -> None:
    """Tests, then asv on the installed package: speed only on green."""
    tests(session)
    with session.chdir("asv_bench"):
        session.run("asv", "machine", "--yes", "--machine", "local")
        session.run("asv", "run", "-m", "local", "--python=same", *(session.posargs or ["--quick"]))


@nox.session
def counts(session: nox.Session) -> None:
    """Instructions of a few calls beside the base's, at most 5 % more, and errors beside the published ones."""
    session.run("python", "scripts/compare_counts.py", *session.posargs)
    if not session.posargs:
        session.run("python", "-m", "linattn", "audit", "--against", "docs/measured/audit.json", env=ONE_THREAD)


@nox.session
def history(session: nox.Session) -> None:
    """A small benchmark over what landed on main, newest last; then pages that need no network."""
    which = session.posargs or ["--steps", "12", "main"]
    with session.chdir("asv_bench"):
        session.run("asv", "machine", "--yes", "--machine", "local")
        measured = [0, 2]  # 2: commits that this benchmark cannot run on are told, and left out
        session.run("asv", "run", "-m", "local", "--skip-existing", "-b", "Landed", *which, success_codes=measured)
    publish(session)


@nox.session
def publish(session: nox.Session) -> None:
    """asv's results as pages that need no network, opened in a browser that has none."""
    session.run("python", "scripts/publish_benchmarks.py", "--check")


@nox.session
def new(session: nox.Session) -> None:
    """All the pieces of a new mechanism, red until they are filled in: `nox -s new -- Nystrom`."""
    session.run("python", "scripts/new.py", *session.posargs)


@nox.session
def release(session: nox.Session) -> None:
    """A release without the upload: built, checked, installed into a clean environment outside, tested there."""
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", f"{folder}/dist")
        session.run("python", "scripts/release.py", folder)


@nox.session
def kernels(session: nox.Session) -> None:
    """CUDA kernels without a GPU: compile all within their budgets, plant all faults."""
    session.run("python", "scripts/kernel_budgets.py", *session.posargs)
    session.run("python", "tests/kernel_faults.py", env=ONE_THREAD)


@nox.session
def peers(session: nox.Session) -> None:
    """Ours beside JAX, torch and other packages, where they are installed: `nox -s peers -- --out docs/measured`."""
    session.run("python", "-m", "asv_bench.peers", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """A wheel and an sdist, checked; they are not kept."""
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", folder)
        session.run("twine", "check", "--strict", f"{folder}/*")
