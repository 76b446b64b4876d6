import subprocess
import sys

import pytest

SAFE = "from tinymim_jax.runtime import streams; streams.make_safe(); import sys, os\n"


def shell(line, code, **env):
    command = ["sh", "-c", line, "sh", sys.executable, "-c", SAFE + code]
    return subprocess.run(command, capture_output=True, env={"PATH": "/usr/bin:/bin", **env}, timeout=60)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_a_terminal_cannot_show_is_replaced(encoding):
    code = "print('é→… done'); print(chr(0xDCE9) + ' bad name', file=sys.stderr)"
    done = shell('"$@"', code, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stdout.decode(encoding).endswith(" done\n")
    assert done.stdout == "é→… done\n".encode(encoding, "replace")
    assert done.stderr == rb"\udce9 bad name" + b"\n"


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_file_opened_later_does_not_get_what_is_printed(closed, tmp_path):
    code = (
        f"f = open({str(tmp_path / 'f')!r}, 'w'); print('out'); print('err', file=sys.stderr); os.write(2, b'raw');"
        " f.write('mine'); sys.exit(3)"
    )
    assert shell(f'"$@" {closed}', code).returncode == 3
    assert (tmp_path / "f").read_text() == "mine"


def test_children_have_what_was_closed():
    code = "import subprocess; subprocess.run([sys.executable, '-c', 'import os; os.fstat(2); print(7)'], check=True)"
    assert shell('"$@" 2>&-', code).stdout == b"7\n"


@pytest.mark.parametrize("reader", ["head -n 1", "true"])
def test_work_goes_on_where_the_reader_has_left(reader, tmp_path):
    code = f"[print('x' * 1000) for _ in range(1000)]; open({str(tmp_path / 'f')!r}, 'w').write('done')"
    done = shell(f'("$@"; echo "status $?" >&2) | {reader}', code)
    assert done.stderr == b"status 0\n" and (tmp_path / "f").read_text() == "done"


def test_a_full_disk_is_still_an_error():
    done = shell('"$@" > /dev/full', "print('x')")
    assert done.returncode and b"No space left" in done.stderr
