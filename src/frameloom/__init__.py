"""frameloom: published methods for video behind one command line and one Python API."""
