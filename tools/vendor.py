"""Fetches the files of other projects that are kept here, as `vendor.lock` pins them, or verifies those that are there.

    python tools/vendor.py            # verify: no network
    python tools/vendor.py --fetch    # anew from npm's registry, against the lock's integrity

A lock names each package with its version, npm's integrity of its archive (sha512), and the files that are kept with
their sha256. To take another release, change its version and integrity there, and run `--fetch --write`.
"""

import argparse
import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
LOCKS = (PROJECT / "app/web/static/vendor/vendor.lock", PROJECT / "tests/browser/vendor.lock")


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--fetch", action="store_true", help="from npm's registry")
    arguments.add_argument(
        "--write", action="store_true", help="take the hashes of what was fetched into the lock"
    )
    chosen = arguments.parse_args()
    wrong: list[str] = []
    for lock in LOCKS:
        packages = json.loads(lock.read_text(encoding="utf-8"))
        if chosen.fetch:
            for package in packages:
                fetch(lock.parent, package, write=chosen.write)
        if chosen.write:
            lock.write_text(json.dumps(packages, indent=2) + "\n", encoding="utf-8")
        wrong += flaws(lock)
    for flaw in wrong:
        print(f"error: {flaw}", file=sys.stderr)
    return 1 if wrong else 0


def folder_of(package: dict[str, Any]) -> str:
    return f"{package['name'].removesuffix('.org')}-{package['version']}"


def flaws(lock: Path) -> Iterator[str]:
    """What is not as the lock says: a file that differs, is missing, or is not in it."""
    pinned = {
        lock.parent / folder_of(package) / Path(name).name: digest
        for package in json.loads(lock.read_text(encoding="utf-8"))
        for name, digest in package["files"].items()
    }
    for path, digest in pinned.items():
        if not path.is_file():
            yield f"{path} is missing: run `python tools/vendor.py --fetch`"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            yield f"{path} is not what {lock.name} pins: run `python tools/vendor.py --fetch`"
    for path in lock.parent.glob("*-*.*/*"):
        if path not in pinned:
            yield f"{path} is not named in {lock.name}: remove it, or add it there"


def fetch(target: Path, package: dict[str, Any], *, write: bool) -> None:
    packed = _packed(f"{package['name']}@{package['version']}")
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(packed).digest()).decode()
    if integrity != package["integrity"]:
        sys.exit(f"error: npm gave {integrity} for {package['name']}, the lock pins {package['integrity']}")
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        for name in package["files"]:
            member = files.extractfile(f"package/{name}")
            if member is None:
                sys.exit(f"error: {package['name']} has no file {name}")
            content = member.read()
            path = target / folder_of(package) / Path(name).name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            if write:
                package["files"][name] = hashlib.sha256(content).hexdigest()


def _packed(release: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", release], cwd=folder, check=True)  # noqa: S603, S607 - of the lock alone
        [archive] = Path(folder).iterdir()
        return archive.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
