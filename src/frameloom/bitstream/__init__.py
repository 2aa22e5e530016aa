"""From integers to bytes in a file and back: quantisers, range coding and the `.flm` container."""
