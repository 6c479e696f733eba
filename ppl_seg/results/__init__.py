"""Results: read-out, volumes, scores, figures and the files a segmentation is written to."""
