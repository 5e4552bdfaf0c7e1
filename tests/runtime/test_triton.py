"""What of the wheels goes into `.triton`; nothing here downloads."""

from __future__ import annotations

import subprocess
from pathlib import Path
from zipfile import ZipFile

from tandem_runtime import triton


def test_unpack_takes_only_the_named_folders(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.writestr("package/bin/server", "#!/bin/sh\nexit 7\n")
        wheel.writestr("package/other", "")
    triton.unpack(tmp_path / "some.whl", {"package/bin/": tmp_path / "bin"})
    assert [path.name for path in (tmp_path / "bin").iterdir()] == ["server"]
    assert subprocess.run([tmp_path / "bin" / "server"]).returncode == 7
