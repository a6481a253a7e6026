"""Low precision: recipes, calibration, quantisation, and the proof of what it costs."""
