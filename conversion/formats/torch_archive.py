"""The zip archive that a `.pt` file is: entries found, compared with their checksums, and bounded before they are read.

Entries are stored as they are (uncompressed), so that values can be used where they lie in the mapped file. What
torch.save does not write (compressed, encrypted or repeated entries) is refused.
"""

import mmap
import struct
import zipfile
import zlib
from pathlib import Path

from virst_jax.errors import UserError

from .source import ends_early, map_file
from .torch_pickle import MAX_BYTES, stored_bytes

_MAX_DIRECTORY = 16 << 20  # bytes; zipfile takes some 15 times as much memory. 2000 tensors have 200 kB
_HEADER = 30  # bytes before an entry's name


class Archive:
    """Entries of a `.pt` file by name, without the folder that they all lie in.

    Raises:
      UserError: no such file, not a zip archive, cut, or not one of a checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.where = str(path)
        self._map: mmap.mmap | None = map_file(Path(path))
        self._check_kind()
        self._check_directory()
        try:
            with zipfile.ZipFile(self.where) as archive:
                listed = archive.infolist()
        except Exception as error:  # zipfile lets many kinds through when the directory is damaged
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.where}: truncated or damaged ({reason}); get the file again") from error
        self._entries = {info.filename: info for info in listed}
        if len(self._entries) < len(listed):
            raise UserError(f"{self.where}: some of its entries come twice; download or save the file again")
        lists = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(lists) != 1:
            found = "no data.pkl" if not lists else "several data.pkl"
            raise UserError(f"{self.where}: a zip file with {found}, so not a PyTorch checkpoint; check the path")
        self._prefix = lists[0].removesuffix("data.pkl")
        # torch.serialization.set_crc32_options(False) leaves the checksums out
        self._has_sums = any(info.CRC for info in listed)
        self._checked: set[str] = set()

    @property
    def mapped(self) -> mmap.mmap:
        """The whole file."""
        if self._map is None:
            raise ValueError(f"{self.where}: is closed")
        return self._map

    def close(self) -> None:
        """Lets go of the file; what views it stays valid."""
        self._map = None

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._entries

    def size(self, name: str) -> int:
        """Bytes of an entry. UserError: it is missing, compressed or encrypted."""
        return self._info(name).file_size

    def place(self, name: str) -> tuple[int, int]:
        """First byte and size of an entry, which is compared with its checksum when it is first asked for.

        Raises:
          UserError: missing, compressed, encrypted or damaged.
        """
        info, mapped = self._info(name), self.mapped
        at, start = info.header_offset, 0
        sound = 0 <= at <= len(mapped) - _HEADER and mapped[at : at + 4] == b"PK\x03\x04"
        if sound:
            name_size, extra_size = struct.unpack_from("<HH", mapped, at + 26)
            stored = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
            start = at + _HEADER + name_size + extra_size
            sound = mapped[at + _HEADER : at + _HEADER + name_size] == stored and start + info.file_size <= len(mapped)
        if not sound:
            raise UserError(f"{self.where}: its entry {name!r:.80} is damaged; get the file again")
        if self._has_sums and name not in self._checked:
            # the pages that this reads stay with the system, for whoever uses the values next
            with memoryview(mapped) as whole, whole[start : start + info.file_size] as part:
                found = zlib.crc32(part)
            if found != info.CRC:
                raise UserError(
                    f"{self.where}: its entry {name!r:.80} differs from its checksum: damaged; download it again"
                )
            self._checked.add(name)
        return start, info.file_size

    def read(self, name: str, limit: int) -> bytes:
        """A small entry. UserError: missing, damaged, or longer than `limit`."""
        size = self.size(name)
        if size > limit:
            raise UserError(f"{self.where}: its entry {name!r} has {size} bytes, far more than a network needs")
        start, size = self.place(name)
        return self.mapped[start : start + size]

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = self._entries.get(self._prefix + name)
        if info is None:
            raise UserError(f"{self.where}: its entry {name!r:.80} is missing; get the file again")
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if not stored or info.flag_bits & 1:
            raise UserError(
                f"{self.where}: its entry {name!r:.80} is compressed or encrypted, not as torch.save writes it; "
                "use the original file or save it again"
            )
        return info

    def _check_kind(self) -> None:
        start = self.mapped[:512]
        if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            return
        tar = start[257:262] == b"ustar"
        if tar or start[:1] == b"\x80":
            raise UserError(
                f"{self.where}: in PyTorch's old {'tar' if tar else 'pickle'} format; save it again where torch is "
                f"installed: torch.save(torch.load(old, weights_only={not tar}), new)"
            )
        raise UserError(f"{self.where}: not a PyTorch checkpoint (not a zip file); check the path or download it again")

    def _check_directory(self) -> None:
        """Looks at the archive's directory before zipfile reads it whole.

        Raises:
          UserError: it is missing, as in a file that was cut, or absurdly large.
        """
        mapped = self.mapped
        at = mapped.rfind(b"PK\x05\x06", max(0, len(mapped) - 22 - 0xFFFF))
        if at < 0 or at + 22 > len(mapped):
            raise self._cut()
        sizes = [int.from_bytes(mapped[at + 12 : at + 16], "little")]
        if mapped[max(0, at - 20) : max(0, at - 16)] == b"PK\x06\x07":
            # the wide form: where zipfile looks for it, and where it is said to be
            records = (at - 76, int.from_bytes(mapped[at - 12 : at - 4], "little"))
            wide = [r for r in records if r >= 0 and mapped[r : r + 4] == b"PK\x06\x06"]
            sizes = [s for s in sizes if s != 0xFFFFFFFF]
            sizes += [int.from_bytes(mapped[r + 40 : r + 48], "little") for r in wide]
        if max(sizes, default=0) > _MAX_DIRECTORY:
            raise UserError(f"{self.where}: its directory has {max(sizes)} bytes, far more than a network needs")

    def _cut(self) -> UserError:
        """The error of a file without its end; the list of tensors, if it comes first, tells how long it was."""
        mapped = self.mapped
        name_size, extra_size = struct.unpack_from("<HH", mapped[:_HEADER].ljust(_HEADER, b"\0"), 26)
        start = _HEADER + name_size + extra_size
        if mapped[_HEADER : _HEADER + name_size].endswith(b"/data.pkl"):
            wanted = start + stored_bytes(mapped[start : start + MAX_BYTES], self.where)
            if wanted > len(mapped):
                return ends_early(self.where, len(mapped), wanted, least=True)
        return UserError(
            f"{self.where}: the file ends early, after {len(mapped)} bytes: its directory is missing; download it again"
        )
