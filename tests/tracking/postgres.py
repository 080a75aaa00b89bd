"""A PostgreSQL server of its own, where its programs are installed: on a unix socket, with its data in a temporary folder."""

import getpass
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USERS = ("postgres", "nobody")  # PostgreSQL refuses to run as root


def programs() -> Path | None:
    """The folder of `initdb` and `pg_ctl`."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


def user() -> str | None:
    """Who runs it: whoever runs this, but not root."""
    if os.geteuid() != 0:
        return getpass.getuser()
    return next((name for name in USERS if name in {entry.pw_name for entry in pwd.getpwall()}), None)


def why_not() -> str:
    """Why it cannot be started here; empty if it can."""
    if programs() is None:
        return "PostgreSQL (initdb, pg_ctl) is not installed"
    return "" if user() else f"PostgreSQL does not run as root, and there is no user {' or '.join(USERS)}"


@contextmanager
def running() -> Iterator[str]:
    """Its URI."""
    owner, folder = user(), Path(tempfile.mkdtemp(prefix="pg-"))  # not in pytest's folders, which other users cannot enter
    data, log = folder / "data", folder / "log"
    other = {"user": owner, "group": pwd.getpwnam(owner).pw_gid} if os.geteuid() == 0 else {}

    def call(program: str, *arguments: str) -> None:
        command = [str(programs() / program), "-D", str(data), *arguments]
        done = subprocess.run(command, cwd=folder, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, **other)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{log.read_text() if log.exists() else ''}"

    try:
        shutil.chown(folder, owner)
        call("initdb", "--auth=trust", "--username=fast_goal", "--encoding=UTF8", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        call("pg_ctl", "--wait", "--log", str(log), "--options", options, "start")
        try:
            yield f"postgresql://fast_goal@/postgres?host={folder}"
        finally:
            call("pg_ctl", "--wait", "--mode=immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
