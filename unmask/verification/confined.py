"""The program that `sandbox.run_confined` starts: confines itself, then runs what it is given. Standard library only.

Input: one JSON object (`code`, `tests`, `token`, `limits`). Output: the token, if code and tests ran to their ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

_PDEATHSIG, _NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 1, 38, 22, 2
_NEW_USER, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000
_EPERM = 1

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FCNTL_COMMANDS = (1, 2, 3, 1030)
"""F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. Not F_SETOWN, by which the kernel can be made to send signals."""

_CALLS: dict[str, dict[str, Any]] = {
    "x86_64": {
        "arch": 0xC000003E,
        # read write close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
        # rt_sigreturn pread64 readv writev access select sched_yield mremap madvise dup nanosleep getpid exit uname
        # getcwd readlink gettimeofday getrlimit getrusage sysinfo times getuid getgid geteuid getegid getppid
        # sigaltstack gettid futex sched_getaffinity getdents64 set_tid_address restart_syscall clock_gettime
        # clock_getres clock_nanosleep exit_group newfstatat readlinkat faccessat pselect6 ppoll set_robust_list
        # getrandom membarrier statx rseq faccessat2
        "plain": (0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 23, 24, 25, 28, 32, 35, 39, 60,
                  63, 79, 89, 96, 97, 98, 99, 100, 102, 104, 107, 108, 110, 131, 186, 202, 204, 217, 218, 219, 228,
                  229, 230, 231, 262, 267, 269, 270, 271, 273, 318, 324, 332, 334, 439),
        "open": ((2, 1), (257, 2)),
        "fcntl": 72,
    },
    "aarch64": {
        "arch": 0xC00000B7,
        # getcwd dup faccessat close getdents64 lseek read write readv writev pread64 pselect6 ppoll readlinkat
        # newfstatat fstat exit exit_group set_tid_address futex set_robust_list nanosleep clock_gettime clock_getres
        # clock_nanosleep sched_getaffinity sched_yield restart_syscall sigaltstack rt_sigaction rt_sigprocmask
        # rt_sigreturn times uname getrlimit getrusage gettimeofday getpid getppid getuid geteuid getgid getegid
        # gettid sysinfo brk munmap mremap mmap mprotect madvise getrandom membarrier statx rseq faccessat2
        "plain": (17, 23, 48, 57, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78, 79, 80, 93, 94, 96, 98, 99, 101, 113, 114,
                  115, 123, 124, 128, 132, 134, 135, 139, 153, 160, 163, 165, 169, 172, 173, 174, 175, 176, 177, 178,
                  179, 214, 215, 216, 222, 226, 233, 278, 283, 291, 293, 439),
        "open": ((56, 2),),
        "fcntl": 25,
    },
}  # fmt: skip
"""Numbers of the calls that are let through; `open` holds (call, argument that holds the flags)."""


def system_call_filter(machine: str) -> bytes:
    """The seccomp program of a machine type: all calls fail with EPERM but those of `_CALLS`.

    Raises:
        KeyError: an unknown machine type.
    """
    calls = _CALLS[machine]
    refuse = _ERRNO | _EPERM
    program = [(_LOAD, 0, 0, _ARCH_AT), (_EQUAL, 1, 0, calls["arch"]), (_RETURN, 0, 0, _KILL)]
    program.append((_LOAD, 0, 0, _NUMBER_AT))
    for number in calls["plain"]:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for number, argument in calls["open"]:
        program += [
            (_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument),
            (_ANY_BIT, 0, 1, _WRITING),
            (_RETURN, 0, 0, refuse),
            (_RETURN, 0, 0, _ALLOW),
        ]
    program += [(_EQUAL, 0, 2 + 2 * len(_FCNTL_COMMANDS), calls["fcntl"]), (_LOAD, 0, 0, _ARGUMENTS_AT + 8)]
    for command in _FCNTL_COMMANDS:
        program += [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW)]
    program += [(_RETURN, 0, 0, refuse), (_RETURN, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def confine(limits: dict[str, Any]) -> None:
    """Give up everything but computing, for good.

    Raises:
        KeyError, OSError: this machine cannot be confined.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.unshare(_NEW_USER | _NEW_NETWORK | _NEW_IPC)  # a second layer; refused in many containers
    memory = limits["memory_mb"] << 20
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    instructions = system_call_filter(os.uname().machine)
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    # struct sock_fprog: a 16-bit count, padding, a pointer.
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(buffer)))
    for arguments in ((_NO_NEW_PRIVS, 1, 0, 0, 0), (_SET_SECCOMP, _MODE_FILTER, program, 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "seccomp is not available")


def main() -> None:
    """Read, confine, run, report."""
    given = json.load(sys.stdin)
    verdict = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    confine(given["limits"])
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for name in ("code", "tests"):
        exec(compile(given[name], f"<{name}>", "exec"), namespace)  # noqa: S102 - what the confinement is for
    os.write(verdict, given["token"].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
