"""Motion between pictures: flow without weights, warping, cuts."""
