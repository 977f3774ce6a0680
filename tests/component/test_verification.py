"""Verdicts: final numbers, code under tests, and hostile code that must not reach anything outside of its process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import ConfigError, PromptError
from unmask.verification import Judge, build_verifier
from unmask.verification.code import CodeVerifier, extract_code
from unmask.verification.confined import system_call_filter
from unmask.verification.numbers import NumberVerifier, final_number
from unmask.verification.sandbox import Limits, run_confined

LIMITS = Limits(cpu_s=2, wall_s=20, memory_mb=256)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 12.", 12),
        ("12 apples cost $1,234.50.", Fraction("1234.5")),
        ("5-3", 3),
        ("it is -3", -3),
        ("a temperature of -$4", -4),
        (r"so \boxed{7} and then 9", 7),
        (r"\boxed{x} and 9", None),
        ("4 + 4 = 8\n#### 8\n(checked twice, 2 ways)", 8),
        ("#### 1,000", 1000),
        ("3/4", Fraction(3, 4)),
        ("0.75", Fraction(3, 4)),
        (".5", Fraction(1, 2)),
        ("8/0", 0),
        ("50%", 50),
        ("v2 has none", None),
        ("", None),
        ("٣", None),
        ("9" * 10_000, int("9" * 31)),
    ],
)
def test_final_numbers(text: str, number: Fraction | None) -> None:
    assert final_number(text) == number


@given(st.fractions(max_denominator=10**6).filter(lambda f: abs(f.numerator) < 10**20), st.text(alphabet="ab .\n"))
def test_a_written_number_is_read_back(number: Fraction, words: str) -> None:
    assert final_number(f"{words} is {number}") == number
    assert final_number(f"1 {words}#### {number}") == number


@given(st.text())
def test_no_text_breaks_the_reader(text: str) -> None:
    final_number(text)


def test_references_are_numbers_or_texts_that_end_with_one() -> None:
    verifier = NumberVerifier()
    assert verifier.is_right("That makes 72.", verifier.reference("48/2=24 ...\n#### 72"))
    assert not verifier.is_right("That makes 71.", verifier.reference(72))
    assert not verifier.is_right("no idea", verifier.reference(0))
    with pytest.raises(PromptError, match=r"generate\.reference: the reference 'none' holds no number"):
        verifier.reference("none")


def test_unknown_verifiers_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'number'"):
        build_verifier("numbers")


class Words:
    """A tokenizer whose ids are indices of words; 0 is a control token."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(["", "it", "is", "7"][i] for i in ids if i)


def test_the_judge_reads_the_column_and_the_text() -> None:
    judge = Judge(Words(), NumberVerifier(), "answer")
    assert judge.is_right([1, 2, 3, 0], judge.reference({"answer": "7"}))
    with pytest.raises(PromptError, match="lacks the reference 'answer'"):
        judge.reference({"prompt": "x"})


@pytest.fixture(scope="module")
def verifier() -> CodeVerifier:
    return CodeVerifier(LIMITS)


def test_code_is_judged_by_its_tests(verifier: CodeVerifier) -> None:
    tests = verifier.reference(["assert add(1, 2) == 3", "assert add(-1, 1) == 0"])
    assert verifier.is_right("Here:\n```python\nimport math, re\ndef add(a, b):\n    return a + b\n```\nDone.", tests)
    assert verifier.is_right("def add(a, b):\n    return a + b\n", tests)
    assert not verifier.is_right("def add(a, b):\n    return a - b\n", tests)
    assert not verifier.is_right("def add(a, b) return a + b", tests)
    assert not verifier.is_right("\0", tests)
    assert not verifier.is_right("\ud800", tests)
    with pytest.raises(PromptError, match="Python text or a list"):
        verifier.reference([1])


def test_the_last_fenced_block_counts() -> None:
    assert extract_code("```\nx = 1\n```\nbetter:\n```py\nx = 2\n```") == "x = 2\n"
    assert extract_code("```python\nx = 3") == "x = 3"
    assert extract_code("x = 4") == "x = 4"


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "quit()",
        "import ctypes; ctypes.string_at(0)",
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        "print('x' * 40)\nimport os\nfor fd in range(3, 10):\n    os.write(fd, b'x' * 32)",
    ],
)
def test_ending_early_is_no_success(verifier: CodeVerifier, code: str) -> None:
    assert not verifier.is_right(code, "pass")


REFUSED = {  # `@` is a folder with a file `kept`
    "fork": "import os\nos.fork()",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "program": "import subprocess\nsubprocess.run(['true'])",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "shell": "import os\nif os.system('true') != 0: raise OSError",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "signal by file": "import os, fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "write outside": "open('@/escaped', 'w')",
    "write inside": "open('here', 'w')",
    "append": "open('@/escaped', 'a')",
    "update": "open('/etc/hostname', 'r+')",
    "remove": "import os\nos.remove('@/kept')",
    "rename": "import os\nos.rename('@/kept', '@/escaped')",
    "directory": "import os\nos.mkdir('@/escaped')",
    "link": "import os\nos.symlink('/etc', '@/escaped')",
    "mode": "import os\nos.chmod('@/kept', 0)",
    "memory file": "import os\nos.memfd_create('x')",
    "internet socket": "import socket\nsocket.socket()",
    "local socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "socket pair": "import socket\nsocket.socketpair()",
    "raise a limit": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "priority": "import os\nos.setpriority(os.PRIO_PROCESS, 0, -5)",
    "leave the group": "import os\nos.setsid()",
    "become another": "import os\nos.setuid(65534)",
    "root of its own": "import os\nos.chroot('.')",
    "alarm": "import signal\nsignal.alarm(1)\nraise OSError",
    "stdin": "input()",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_call_is_refused(name: str, tmp_path: Path) -> None:
    """Each call raises inside; the sample that catches it runs to its end, and nothing has happened."""
    kept = tmp_path / "kept"
    kept.touch()
    code = "\n".join(f"    {line}" for line in REFUSED[name].replace("@", str(tmp_path)).splitlines())
    caught = f"try:\n{code}\nexcept (OSError, RuntimeError, EOFError, ValueError):\n    refused = True"
    assert run_confined(caught, "assert refused", LIMITS)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.stat().st_mode & 0o600


def test_a_listening_service_is_not_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not run_confined(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))", "pass", LIMITS)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import signal\nfor s in range(1, 64):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "x = [0] * 10**9",
        "x = ['x' * 10**6 for _ in range(10**6)]",
        "import mmap\nmmap.mmap(-1, 1 << 30)",
        "x = 10 ** 10 ** 9",
    ],
)
def test_what_takes_too_much_ends(code: str) -> None:
    assert not run_confined(code, "pass", LIMITS)


def test_what_sleeps_is_ended_by_the_clock() -> None:
    start = time.monotonic()
    assert not run_confined("import time\ntime.sleep(600)", "pass", Limits(wall_s=2))
    assert time.monotonic() - start < 60


def test_a_flood_of_output_goes_nowhere() -> None:
    flood = "import os, sys\nfor _ in range(200):\n    print('x' * 10**6)\n    print('x' * 10**6, file=sys.stderr)"
    assert run_confined(flood, "pass", LIMITS)


def test_nothing_of_the_job_is_inherited() -> None:
    probe = (
        "import os, sys\n"
        "assert not os.environ.keys() - {'LC_CTYPE'}, os.environ\n"
        "assert os.listdir() == []\n"
        "assert 'torch' not in sys.modules and not any('site-packages' in p for p in sys.path)\n"
        "assert set(os.listdir('/proc/self/fd')) <= set('01234567'), os.listdir('/proc/self/fd')\n"
    )
    with Path("/dev/null").open() as held:
        os.set_inheritable(held.fileno(), True)
        assert run_confined(probe, "pass", LIMITS)


def test_no_process_is_left_behind() -> None:
    run_confined("while True: pass", "pass", Limits(wall_s=1))
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True)
    assert "confined.py" not in children.stdout


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_it_holds_without_privileges() -> None:
    """Root of a namespace of its own, in which no further one is to be had: the filter alone."""
    code = (
        "from unmask.verification.code import CodeVerifier\n"
        "verifier = CodeVerifier()\n"
        "assert verifier.is_right('x = 1', 'assert x == 1')\n"
        "assert not verifier.is_right('import os; os.kill(os.getppid(), 9)', 'pass')\n"
        "assert not verifier.is_right('import socket; socket.socket()', 'pass')\n"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"',
         "sh", sys.executable, "-c", code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_filter_is_a_whole_program_for_each_machine() -> None:
    for machine in ("x86_64", "aarch64"):
        program = system_call_filter(machine)
        assert len(program) % 8 == 0
        assert len(program) // 8 < 4096
        assert _run_filter(program, 0xB7 if machine == "x86_64" else 0x3E, 1) == 0x80000000
    with pytest.raises(KeyError):
        system_call_filter("riscv64")


def _run_filter(program: bytes, arch: int, number: int, arguments: tuple[int, ...] = (0,) * 6) -> int:
    """A classic-BPF interpreter of the few instructions that the filter is made of."""
    import struct

    data = struct.pack("<IIQ6Q", number, 0xC0000000 | arch, 0, *arguments)
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator = position = 0
    while True:
        code, if_true, if_false, k = instructions[position]
        position += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif code == 0x06:
            return k
        else:
            holds = accumulator == k if code == 0x15 else bool(accumulator & k)
            position += if_true if holds else if_false


@pytest.mark.parametrize(
    ("machine", "arch", "read", "openat", "fcntl"), [("x86_64", 0x3E, 0, 257, 72), ("aarch64", 0xB7, 63, 56, 25)]
)
def test_the_filter_lets_through_what_it_says(machine: str, arch: int, read: int, openat: int, fcntl: int) -> None:
    program, allow, refuse = system_call_filter(machine), 0x7FFF0000, 0x00050001
    assert _run_filter(program, arch, read) == allow
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_RDWR | os.O_APPEND):
        assert _run_filter(program, arch, openat, (0, 0, flags, 0, 0, 0)) == refuse
    assert _run_filter(program, arch, openat, (0, 0, os.O_CLOEXEC, 0, 0, 0)) == allow
    for command in range(2000):
        expected = allow if command in (1, 2, 3, 1030) else refuse
        assert _run_filter(program, arch, fcntl, (0, command, 0, 0, 0, 0)) == expected
    passed = {number for number in range(600) if _run_filter(program, arch, number) == allow}
    assert len(passed) < 75
    # The x32 calls of x86-64 carry a bit of their own.
    assert _run_filter(program, arch, read | 0x40000000) == refuse


@pytest.mark.parametrize(
    ("text", "number"), [("1,234 in all", 1234), ("12,345,678", 12345678), ("1,2,3", 3), ("it is 1,23", 23)]
)
def test_commas_are_of_thousands_only(text: str, number: int) -> None:
    assert final_number(text) == number
