"""The module names of the authors' published code, and converters for its files.

In a script written for that code, ``modules.bridge``, ``modules.side_vit`` and
``modules.frozen_vit`` become ``fpt_fast.compat.bridge``, ``.side_vit`` and ``.frozen_vit``:
same names, signatures, return values and state-dict keys.  ``checkpoints``, ``configs`` and
``features`` read its weights, its configurations and its preloaded features.  Nothing here is
imported by the rest of the library.
"""
