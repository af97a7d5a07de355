"""The needle in a haystack: real handwritten digits hidden in large textured images."""
