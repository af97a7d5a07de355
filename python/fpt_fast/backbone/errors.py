"""The error of this stage."""


class BackboneError(ValueError):
    """A frozen model that cannot be loaded or used: what was expected, what came, what to do."""
