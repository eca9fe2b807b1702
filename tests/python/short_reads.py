"""A FUSE file system that shows a folder, and never reads as much as was asked for. With a BYTE,
reads from that byte on fail (EIO) in any file, and files can be mapped.

    python short_reads.py FOLDER MOUNTPOINT [BYTE]"""

import errno
import os
import sys

import mfusepy


class ShortReads(mfusepy.Operations):
    use_ns = True

    def __init__(self, folder):
        self.folder = folder

    def path(self, path):
        return self.folder + path

    def getattr(self, path, fh=None):
        st = os.lstat(self.path(path))
        return {
            "st_mode": st.st_mode,
            "st_nlink": st.st_nlink,
            "st_size": st.st_size,
            "st_ino": st.st_ino,
            "st_mtime": st.st_mtime_ns,
            "st_ctime": st.st_ctime_ns,
            "st_atime": st.st_atime_ns,
        }

    def readdir(self, path, fh):
        return [".", "..", *os.listdir(self.path(path))]

    def open(self, path, flags):
        return os.open(self.path(path), os.O_RDONLY)

    def release(self, path, fh):
        os.close(fh)
        return 0

    def read(self, path, size, offset, fh):
        return os.pread(fh, max(1, size * 2 // 3 - offset % 7), offset)


class FailingReads(ShortReads):
    def __init__(self, folder, byte):
        super().__init__(folder)
        self.byte = byte

    def read(self, path, size, offset, fh):
        if offset + size > self.byte and os.fstat(fh).st_size > self.byte:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.pread(fh, size, offset)


if __name__ == "__main__":
    folder, mountpoint, *byte = sys.argv[1:]
    disk = FailingReads(folder, int(*byte)) if byte else ShortReads(folder)
    mfusepy.FUSE(disk, mountpoint, foreground=True, direct_io=not byte, ro=True)
