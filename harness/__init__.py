"""What any training script needs: options, images, datasets, CLIP checkpoints, the files of a run, scores."""
