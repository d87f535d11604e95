"""Where a dataset's files are and how they come here: paths, URLs of web servers and object stores, the Hugging Face hub.

dataset_files     a dataset's files, named, identified and checked: what a plan asks for
  local_files     paths and globs on this machine
  remote_files    everything else, and what is remembered of it: HTTP, and
    hub_files       repositories of the Hugging Face Hub
    filesystems     object stores and whatever else fsspec opens
    file_lists      lists of URLs
transfer          brings files here: what a download asks for
  part_file       a file that is arriving
  parallel_jobs   threads that end when they are told to
globs, source_memory                            what the first half shares
source_file, http_requests, request_limits      what both halves share
"""

from __future__ import annotations

from tasks.sources.dataset_files import check_files, find_one, list_files
from tasks.sources.local_files import PACKAGED_TEXTS
from tasks.sources.source_file import DataError, NotListed, SourceFile, check_file_name, public_location

__all__ = [
    "PACKAGED_TEXTS",
    "DataError",
    "NotListed",
    "SourceFile",
    "check_file_name",
    "check_files",
    "find_one",
    "list_files",
    "public_location",
]
