"""Local disk and S3 behind a few functions: list, read, write, delete."""

from pipeline.storage.faults import storage_errors
from pipeline.storage.files import (
    delete_file,
    delete_folder,
    delete_unfinished,
    exists,
    glob_files,
    ignores_create_only,
    is_empty,
    is_file,
    list_files,
    list_names,
    list_sizes,
    open_read,
    put_file,
    read_bytes,
    replace_file,
    stat_file,
    write_bytes,
    write_new,
)
from pipeline.storage.local import SPECIAL
from pipeline.storage.retry import set_storage_timeout
from pipeline.storage.uri import FileInfo, check_uri, is_s3, join, parent, relative

__all__ = [
    "SPECIAL",
    "FileInfo",
    "check_uri",
    "delete_file",
    "delete_folder",
    "delete_unfinished",
    "exists",
    "glob_files",
    "ignores_create_only",
    "is_empty",
    "is_file",
    "is_s3",
    "join",
    "list_files",
    "list_names",
    "list_sizes",
    "open_read",
    "parent",
    "put_file",
    "read_bytes",
    "relative",
    "replace_file",
    "set_storage_timeout",
    "stat_file",
    "storage_errors",
    "write_bytes",
    "write_new",
]
