"""The module names of the authors' published code, and converters for its files.

In a script written for that code, ``modules.bridge``, ``modules.side_vit``,
``modules.frozen_vit`` and ``modules.builder`` become ``fpt_fast.compat.bridge`` and so on: same
names, signatures, return values and state-dict keys.  ``checkpoints``, ``configs`` and
``features`` read its weights, its configurations and its preloaded features.  Nothing here is
imported by the rest of the library.
"""
