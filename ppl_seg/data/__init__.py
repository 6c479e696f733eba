"""Files to tensors: images, names, label tables, grids, masks, augmentation, cohorts. Knows no model."""
