"""One executable claim a method: it runs the method against the baseline its paper compares with, and says so."""
