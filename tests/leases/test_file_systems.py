"""Local disks and shared storage, told apart by the tables of mounted file systems."""

import pytest

from alignvlm_jax.leases import file_systems

# Lines as in proc(5).
MOUNTINFO = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /share rw - nfs4 10.0.0.2:/share rw,vers=4.1
31 22 0:41 / /home rw - autofs auto.home rw
32 31 0:42 / /home rw - nfs nas:/home rw
33 22 0:43 / /lus/grand rw - lustre 10.0.0.3@o2ib:/grand rw
34 22 0:44 / /gpfs rw - gpfs gpfs rw
35 22 0:45 / /mnt/my\040bucket rw - fuse.gcsfuse bucket rw
36 22 0:46 / /win rw - cifs //server/share rw
37 22 0:47 / /dev/shm rw - tmpfs tmpfs rw
38 22 0:48 / /new rw - somethingfs dev rw
39 30 8:2 / /share/scratch rw - xfs /dev/nvme0n1 rw
"""


@pytest.mark.parametrize(
    "path, is_shared",
    [
        ("/data/runs", False),
        ("/share", True),
        ("/share/runs/a", True),
        ("/shared/runs", False),  # not below /share
        ("/share/scratch/runs", False),
        ("/home/me", True),  # the file system that was mounted last
        ("/lus/grand/a", True),
        ("/gpfs/a", True),
        ("/mnt/my bucket/a", True),
        ("/win/a", True),
        ("/dev/shm/a", False),
        ("/new/a", True),  # an unknown type
    ],
)
def test_the_type_of_the_file_system_decides(path, is_shared, monkeypatch):
    """GoogleCloudPlatform/gcsfuse and NFS do not pass locks on to other hosts."""
    monkeypatch.setattr(file_systems.sys, "platform", "linux")
    monkeypatch.setattr(file_systems, "_read", lambda path: MOUNTINFO)
    assert file_systems.is_shared(path) == is_shared


def test_an_unknown_system_counts_as_shared(monkeypatch, tmp_path):
    monkeypatch.setattr(file_systems, "_read", lambda path: "")
    monkeypatch.setattr(file_systems, "_mount_command", lambda: "")
    assert file_systems.is_shared(tmp_path)


def test_the_output_of_mount_on_macos_is_read():
    output = "/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled)\n//a@nas/b on /Volumes/b c (smbfs, nodev)\n"
    assert file_systems._bsd_mounts(output) == [("/System/Volumes/Data", "apfs"), ("/Volumes/b c", "smbfs")]
