"""The feature cache: what the frozen model gave for each image, on disk, crash-safe.

``CacheWriter`` builds, resumes and extends; ``CacheReader`` reads; ``inspect_cache``,
``verify_cache`` and ``drop_bad_records`` look after it.  The format is in docs/cache-format.md.
"""

from fpt_fast.cache.errors import (
    CacheBusy,
    CacheCorrupt,
    CacheError,
    CacheFull,
    CacheKeyError,
    CacheMismatch,
    CacheNotFound,
    CacheUnfinished,
    FeatureValueError,
)
from fpt_fast.cache.format import FORMAT_VERSION, Fingerprint
from fpt_fast.cache.layout import RecordLayout
from fpt_fast.cache.memory import BufferPool, allocate_tokens, token_bytes
from fpt_fast.cache.ranks import SharedWriter
from fpt_fast.cache.reader import CacheReader
from fpt_fast.cache.tools import (
    CacheReport,
    Forecast,
    drop_bad_records,
    forecast,
    inspect_cache,
    verify_cache,
)
from fpt_fast.cache.writer import CacheWriter

__all__ = [
    "FORMAT_VERSION",
    "BufferPool",
    "CacheBusy",
    "CacheCorrupt",
    "CacheError",
    "CacheFull",
    "CacheKeyError",
    "CacheMismatch",
    "CacheNotFound",
    "CacheReader",
    "CacheReport",
    "CacheUnfinished",
    "CacheWriter",
    "FeatureValueError",
    "Fingerprint",
    "Forecast",
    "RecordLayout",
    "SharedWriter",
    "allocate_tokens",
    "drop_bad_records",
    "forecast",
    "inspect_cache",
    "token_bytes",
    "verify_cache",
]
