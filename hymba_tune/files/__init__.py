"""Everything that writes or replaces files and folders safely: atomic writes, locks, and checks of output paths."""

from hymba_tune.files.folders import atomic_folder, check_new_folder, make_folders, new_folder, remove_empty, replacing
from hymba_tune.files.kinds import MODEL, REPLACED, RUN, FolderKind, entries, remove
from hymba_tune.files.leftovers import remove_leftovers
from hymba_tune.files.locks import LOCK, InUseError, locked
from hymba_tune.files.outputs import check_file, check_folder, write_errors
from hymba_tune.files.reading import read_yaml
from hymba_tune.files.sealing import WHOLE, is_whole, seal
from hymba_tune.files.torn import read_json, read_json_lines, read_metrics
from hymba_tune.files.writing import PARTIAL, aside, atomic_write, flush_to_disk, put_in_place, write_text

__all__ = [
    "LOCK",
    "MODEL",
    "PARTIAL",
    "REPLACED",
    "RUN",
    "WHOLE",
    "FolderKind",
    "InUseError",
    "aside",
    "atomic_folder",
    "atomic_write",
    "check_file",
    "check_folder",
    "check_new_folder",
    "entries",
    "flush_to_disk",
    "is_whole",
    "locked",
    "make_folders",
    "new_folder",
    "put_in_place",
    "read_json",
    "read_json_lines",
    "read_metrics",
    "read_yaml",
    "remove",
    "remove_empty",
    "remove_leftovers",
    "replacing",
    "seal",
    "write_errors",
    "write_text",
]
