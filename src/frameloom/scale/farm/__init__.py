"""Many files, one verb: what is to be done (`manifest`), who does it (`worker`), and where (the three engines).

A unit of work is one input and one output. It is safe to do a unit twice: a worker writes where nobody looks, and a
rename makes the result appear; its sidecar says what it was made of, so that a later run knows what is done. That
leaves the engines with little to promise: that every unit is done at least once, whoever dies.
"""
