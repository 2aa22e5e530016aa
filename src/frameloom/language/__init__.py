"""Words in: closed vocabularies and text encoders."""
