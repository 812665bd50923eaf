"""Locates image files in directories, tar files and zip files by names and headers; nothing is unpacked.

Archives are read in place: a member is a byte range of the archive, which `records.Files` reads later. What can't be
read this way, or would be written outside if it were unpacked, is rejected with an error that names it: links, devices,
`..`, absolute names, encryption, compression other than zip's deflate.
"""

import hashlib
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from dcgan import storage
from dcgan.config import Data, default_home
from dcgan.data.records import Entry
from dcgan.data.sources import published
from dcgan.data.store import SourceFile

EXTENSIONS = frozenset({".jpeg", ".jpg"})  # of ImageNet's images, all of them JPEG by name; a few hold PNG or CMYK
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., length of its name, of its extra field
ENCRYPTED = 0x1  # zip's flag


class Member(NamedTuple):
    """A file in a directory, or one inside an archive.

    name: in the directory or archive. size: bytes of its content. changed: in nanoseconds since 1970, 0 in an archive.
    offset, length, deflated: where its bytes are in `path`, as in `records.Entry`.
    """

    name: str
    path: Path
    size: int
    changed: int = 0
    offset: int = 0
    length: int = -1
    deflated: bool = False

    def entry(self, name: str, label: int) -> Entry:
        """The record of this image, under the name that it has in the data set."""
        return Entry(name, self.path, label, self.offset, self.length, self.deflated)


def tree(data: Data, name: str) -> Path:
    """The directory of `data.source` for a signature: what is at S3 is staged to where `read` will find it."""
    return published.tree(data, (data.home or default_home()) / "downloads" / name)


def in_directory(directory: Path) -> list[Member]:
    """The JPEG files in a directory, not below it, sorted by name; names that start with a dot are skipped.

    Links are followed: many subsets of ImageNet are directories of links.
    """
    with os.scandir(directory) as entries:
        files = [entry for entry in entries if _is_image(entry.name) and entry.is_file()]
        return sorted(_whole(file.name, directory / file.name, file.stat()) for file in files)


def file(path: Path) -> Member:
    """A file of a directory."""
    return _whole(path.name, path, path.stat())


def _whole(name: str, path: Path, status: os.stat_result) -> Member:
    return Member(name, path, status.st_size, status.st_mtime_ns)


def in_tar(path: Path) -> list[Member]:
    """The files in an uncompressed tar file, sorted by name; raises CorruptError as `_files` says."""
    with _reading(str(path)), tarfile.open(path, "r:") as archive:
        return sorted(_stretch(info, path, 0) for info in _files(archive, str(path)))


def in_nested_tar(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, list[Member]]]:
    """As `in_tar`, for each `wanted` tar file inside a tar file: its name and its files."""
    with _reading(str(path)), tarfile.open(path, "r:") as outer:
        for info in _files(outer, str(path)):
            if not wanted(info.name):
                continue
            content = outer.extractfile(info)
            assert content is not None, "a regular file has content"
            where = f"{path}: {info.name}"
            with _reading(where), content, tarfile.open(fileobj=content, mode="r:") as inner:
                yield info.name, sorted(_stretch(each, path, info.offset_data) for each in _files(inner, where))


def in_zip(path: Path) -> list[Member]:
    """The files in a zip file, in its order; raises CorruptError, naming it, if one can't be read in place."""
    with _reading(str(path)), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        return [_zipped(info, file, path) for info in archive.infolist() if not info.is_dir()]


def listing(name: str, members: Iterable[tuple[str, int]]) -> SourceFile:
    """The manifest's entry for many image files: a hash of their names in the data set and their lengths.

    It saves reading their bytes twice: a manifest has the hashes of the shards that are made from them.
    """
    whole, total = hashlib.sha256(), 0
    for member, size in members:
        whole.update(os.fsencode(member) + f"\0{size}\n".encode())
        total += size
    return SourceFile(f"{name}, by names and lengths", total, whole.hexdigest())


def stamp(members: Iterable[Member]) -> str:
    """A hash of names, lengths and modification times: equal only if the files of a directory are equal."""
    whole = hashlib.sha256()
    for member in members:
        whole.update(os.fsencode(member.name) + f"\0{member.size} {member.changed}\n".encode())
    return whole.hexdigest()


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as error:
        raise storage.CorruptError(f"{where} is damaged or cut short: {error}") from error


def _files(archive: tarfile.TarFile, where: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar; raises CorruptError for anything but them and directories, or if it ends early."""
    for info in archive:
        _require_inside(info.name, where)
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise storage.CorruptError(f"{where}: {info.name} is a link or a special file: only plain files are read")
        yield info
    # tarfile takes a broken header for the end. A proper tar ends with a block of zeros, a sloppy one with its file.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if any(archive.fileobj.read(tarfile.BLOCKSIZE)):
        raise storage.CorruptError(f"{where} is damaged or cut short: no header at byte {archive.offset}")


def _require_inside(name: str, where: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise storage.CorruptError(f"{where}: the name {name} leads out of the archive")


def _stretch(info: tarfile.TarInfo, path: Path, start: int) -> Member:
    return Member(info.name, path, info.size, 0, start + info.offset_data, info.size)


def _zipped(info: zipfile.ZipInfo, file: BinaryIO, path: Path) -> Member:
    """The bytes after the member's own header, whose extra field may be longer than the central directory's copy."""
    where = f"{path}: {info.filename}"
    _require_inside(info.filename, str(path))
    if info.flag_bits & ENCRYPTED or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise storage.CorruptError(f"{where} is encrypted, or compressed by method {info.compress_type}")
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or not header.startswith(zipfile.stringFileHeader):  # type: ignore[attr-defined]
        raise storage.CorruptError(f"{where} has no header at byte {info.header_offset}")
    _, name, extra = LOCAL_HEADER.unpack(header)
    offset = info.header_offset + LOCAL_HEADER.size + name + extra
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    return Member(info.filename, path, info.file_size, 0, offset, info.compress_size, deflated)
