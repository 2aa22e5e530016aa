"""Models larger than a device, jobs larger than a machine: schedules, layouts, stores, and what proves them."""
