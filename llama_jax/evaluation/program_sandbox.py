"""Runs the Python program on standard input behind a seccomp filter; writes PASSED if it ends.

`run_program.py` starts this file by its path, isolated: it imports nothing of llama_jax.
"""

import ctypes
import os
import resource
import struct
import sys
from itertools import chain

PASSED = b"passed"
NO_FILTER = 77  # exit code: the kernel doesn't accept the filter
CPU_SECONDS, MEMORY_BYTES = 5, 4 << 30

_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x50000 | 1, 0x50000 | 38
_X86_64 = 0xC000003E

# Numbers of system calls on x86-64 (Linux, arch/x86/entry/syscalls/syscall_64.tbl).
_DENIED = {
    "sockets": [41, 42, 43, 49, 50, 53, 288],
    "io_uring": [425, 426, 427],
    "creat, truncate": [85, 76],
    "rename, unlink, rmdir, mkdir": [82, 264, 316, 87, 263, 84, 83, 258],
    "link, symlink, mknod": [86, 265, 88, 266, 133, 259],
    "chmod, chown": [90, 91, 268, 452, 92, 93, 94, 260],
    "times and attributes": [132, 235, 261, 280, 188, 189, 190, 197, 198, 199],
    "fork, vfork, execve, execveat": [57, 58, 59, 322],
    "kill, tkill, tgkill, sigqueue, pidfd": [62, 200, 234, 129, 297, 424, 434, 438],
    "ptrace, process_vm, process_madvise": [101, 310, 311, 440],
    "mounts, namespaces, chroot": [165, 166, 272, 308, 161, 155, 428, 429, 430, 431, 432, 442],
    "bpf, perf, keys, prlimit, priority": [321, 298, 248, 249, 250, 302, 141, 251],
    "shared memory, queues, memfd, handles": [29, 64, 68, 240, 319, 447, 304],
}
_CLONE, _CLONE3, _OPEN, _OPENAT, _OPENAT2 = 56, 435, 2, 257, 437
_CLONE_THREAD = 0x10000
_NEWER = 453  # later system calls are not known here
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Operations of the filter's machine (linux/bpf_common.h).
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def _filter() -> list[tuple[int, int, int, int]]:
    """Returns the filter: (operation, jump if true, jump if false, operand) each."""
    number, arch = 0, 4  # offsets in struct seccomp_data; argument i is at 16 + 8·i

    def flags(call: int, argument: int, bits: int, if_set: int, if_clear: int) -> list:
        return [
            (_EQUAL, 0, 4, call), (_LOAD, 0, 0, 16 + 8 * argument), (_ANY_BIT, 0, 1, bits),
            (_RETURN, 0, 0, if_set), (_RETURN, 0, 0, if_clear),
        ]  # fmt: skip

    def result(operation: int, operand: int, value: int) -> list:
        return [(operation, 0, 1, operand), (_RETURN, 0, 0, value)]

    return [
        (_LOAD, 0, 0, arch), (_EQUAL, 1, 0, _X86_64), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, number),
        *result(_AT_LEAST, _NEWER, _ENOSYS),  # also the numbers of the x32 interface
        *flags(_OPEN, 1, _WRITES, _EPERM, _ALLOW),
        *flags(_OPENAT, 2, _WRITES, _EPERM, _ALLOW),
        *flags(_CLONE, 0, _CLONE_THREAD, _ALLOW, _EPERM),
        *result(_EQUAL, _CLONE3, _ENOSYS), *result(_EQUAL, _OPENAT2, _ENOSYS),
        *(line for call in chain(*_DENIED.values()) for line in result(_EQUAL, call, _EPERM)),
        (_RETURN, 0, 0, _ALLOW),
    ]  # fmt: skip


def _install_filter() -> bool:
    """Returns whether the kernel applies the filter to this process from now on."""
    if os.uname().machine != "x86_64" or sys.platform != "linux":
        return False
    lines = _filter()
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    set_no_new_privs, set_seccomp, mode_filter = 38, 22, 2
    return (
        prctl(set_no_new_privs, 1, 0, 0, 0) == 0
        and prctl(set_seccomp, mode_filter, ctypes.create_string_buffer(program), 0, 0) == 0
    )


def main() -> None:
    """Runs the program, with limits."""
    source = sys.stdin.read()
    verdict = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    os.closerange(max(nothing, verdict) + 1, 1 << 16)
    for limit, value in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(limit, (value, value))
    if not _install_filter():
        sys.exit(NO_FILTER)
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})
    os.write(verdict, PASSED)


if __name__ == "__main__":
    main()
