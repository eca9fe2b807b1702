"""What a disk may hold after a power cut, derived from the log that perta_faulty writes
(tests/faults).

Only what was synced is certain. Of the rest, each file keeps a random choice of its sectors of 512
bytes, old or new, and each folder the first few of its new, removed and changed names,
independently of everything else. That is less than ext4 or XFS promise.
"""

import shutil
from pathlib import Path

SECTOR = 512


class File:
    def __init__(self, data=b""):
        self.now, self.synced = bytearray(data), bytes(data)
        self.pending = []  # since the last sync: (offset, bytes), or a length

    def write(self, at, data):
        self.change(self.now, at, data)
        self.pending.append((at, data))

    def resize(self, length):
        self.cut(self.now, length)
        self.pending.append(length)

    def sync(self):
        self.synced, self.pending = bytes(self.now), []

    @staticmethod
    def change(content, at, data):
        content.extend(bytes(max(0, at + len(data) - len(content))))
        content[at : at + len(data)] = data

    @staticmethod
    def cut(content, length):
        del content[length:]
        content.extend(bytes(length - len(content)))

    def after_cut(self, rng):
        content = bytearray(self.synced)
        share = rng.choice([0, 0, 0.5, 1])  # 0: nothing of it is kept
        for op in self.pending:
            if isinstance(op, int):
                if rng.random() < share:
                    self.cut(content, op)
                continue
            at, data = op
            first = at // SECTOR * SECTOR
            for sector in range(first, at + len(data), SECTOR):
                begin, end = max(sector, at), min(sector + SECTOR, at + len(data))
                if rng.random() < share:
                    self.change(content, begin, data[begin - at : end - at])
        return bytes(content)


class Folder:
    def __init__(self):
        self.real = None  # where it is after the run, or where it was moved when it was removed
        self.now, self.synced, self.pending = {}, {}, []

    def change(self, **names):
        """Set names and what they are (None: removed), all at once."""
        self.apply(self.now, names)
        self.pending.append(names)

    def sync(self):
        self.synced, self.pending = dict(self.now), []

    @staticmethod
    def apply(entries, names):
        for name, node in names.items():
            entries.pop(name, None)
            if node is not None:
                entries[name] = node

    def after_cut(self, rng):
        """This folder, and for each name what it is: another such pair, or the bytes of a file."""
        entries = dict(self.synced)
        for names in self.pending[: rng.randint(0, len(self.pending))]:
            self.apply(entries, names)
        return self, {name: node.after_cut(rng) for name, node in entries.items()}


class Disk:
    """The part of root whose names begin with out. What exists at the start counts as synced."""

    def __init__(self, root: Path):
        self.root = root
        self.top = self.load(root, lambda name: name.startswith("out"))

    def load(self, path, wanted=lambda name: True):
        folder = Folder()
        for entry in path.iterdir():
            if wanted(entry.name):
                node = self.load(entry) if entry.is_dir() else File(entry.read_bytes())
                folder.change(**{entry.name: node})
                if isinstance(node, File):
                    node.sync()
        folder.sync()
        return folder

    def parent(self, path):
        """The folder that contains a path, and its name there; None if it is not on this disk."""
        try:
            parts = Path(path).relative_to(self.root).parts
        except ValueError:
            return None, ""
        folder = self.top
        for part in parts[:-1]:
            folder = folder.now[part]
        return folder, parts[-1] if parts else ""

    def find(self, path):
        folder, name = self.parent(path)
        return folder.now.get(name) if folder and name else folder

    def cut_power(self, log: Path, rng):
        """Restore what a power cut leaves of the run that wrote this log, at a random place in
        it. Returns whether that was its end."""
        lines = log.read_text().splitlines()
        at = rng.randint(0, len(lines))
        with open(f"{log}.bytes", "rb") as data:
            for line in lines[:at]:
                self.do(data, *line.split("\t"))
            left = self.top.after_cut(rng)
            for line in lines[at:]:
                self.do(data, *line.split("\t"))
        self.remember(self.top, self.root)
        self.put_all(left)
        return at == len(lines)

    def do(self, data, op, path, first="", second=""):
        content = data.read(int(second)) if op == "write" else b""
        folder, name = self.parent(path)
        if not folder:
            return
        if op in ("create", "mkdir"):
            folder.change(**{name: File() if op == "create" else Folder()})
        elif op == "remove":
            if first:
                folder.now[name].real = Path(first)
            folder.change(**{name: None})
        elif op in ("rename", "exchange"):
            to = self.parent(first)[1]
            other = folder.now.get(to) if op == "exchange" else None
            folder.change(**{name: other, to: folder.now[name]})
        elif node := self.find(path):
            if op == "write":
                node.write(int(first), content)
            elif op == "truncate":
                node.resize(int(first))
            elif op == "extend":
                node.resize(max(len(node.now), int(first)))
            elif op == "sync":
                node.sync()
            else:
                raise ValueError(op)

    def remember(self, folder, path):
        """Remember where folders are after the run: they keep their inodes, by which the journal
        identifies them."""
        folder.real = path
        for name, node in folder.now.items():
            if isinstance(node, Folder):
                self.remember(node, path / name)

    def put_all(self, left):
        spare = self.root / "spare"
        spare.mkdir()
        for n, folder in enumerate(self.inner_folders(self.top)):
            folder.real = folder.real.rename(spare / str(n))
        for old in self.root.glob("out*"):
            old.unlink()
        self.put(left, self.root)
        shutil.rmtree(spare)

    def inner_folders(self, folder):
        """Deepest first."""
        for node in folder.now.values():
            if isinstance(node, Folder):
                yield from self.inner_folders(node)
                yield node

    def put(self, left, path):
        folder, entries = left
        if folder is not self.top:
            folder.real.rename(path)
            for old in path.iterdir():
                old.unlink()
        for name, node in entries.items():
            if isinstance(node, bytes):
                (path / name).write_bytes(node)
            else:
                self.put(node, path / name)
