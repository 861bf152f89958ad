"""Tells local disks from storage that several hosts share, by the type of the file system."""

import os
import re
import subprocess
import sys
from pathlib import Path

_LOCAL_TYPES = {
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "nilfs2"),
    *("tmpfs", "ramfs", "rootfs", "devtmpfs", "overlay", "aufs", "ecryptfs", "squashfs", "iso9660"),
    *("apfs", "hfs", "vfat", "msdos", "exfat", "ntfs", "ntfs3", "fuseblk"),
}
"""Types whose locks the operating system of one host manages. Any other type counts as shared: NFS, Lustre, GPFS, CIFS,
FUSE (also gcsfuse), and those that are not known."""


def is_shared(path: str | Path) -> bool:
    """Returns whether other hosts may write to the file system of a path. The path need not exist."""
    path = os.path.realpath(path)
    mounts = _linux_mounts(_read("/proc/self/mountinfo")) if sys.platform == "linux" else _bsd_mounts(_mount_command())
    return _type_at(path, mounts) not in _LOCAL_TYPES


def _type_at(path: str, mounts: list[tuple[str, str]]) -> str | None:
    """Returns the type of the file system of a path, or None if it is not known."""
    found, longest = None, -1
    for point, kind in mounts:
        is_above = path == point or path.startswith(point.rstrip("/") + "/")
        # Of two file systems mounted at the same point, the later one is visible.
        if is_above and len(point) >= longest:
            found, longest = kind, len(point)
    return found


def _linux_mounts(mountinfo: str) -> list[tuple[str, str]]:
    r"""Returns (folder, type) of each mounted file system, in the order in which they were mounted.

    before: 36 35 98:0 / /mnt/a\040b rw,noatime master:1 - ext3 /dev/root rw
    after:  ("/mnt/a b", "ext3")
    """
    mounts = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if after:
            point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), before.split()[4])
            mounts.append((point, after.split()[0]))
    return mounts


def _bsd_mounts(output: str) -> list[tuple[str, str]]:
    """Returns the same from the output of `mount` on macOS.

    before: /dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled)
    after:  ("/System/Volumes/Data", "apfs")
    """
    return re.findall(r" on (/.*) \((\w+)", output)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _mount_command() -> str:
    try:
        return subprocess.run(["/sbin/mount"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
