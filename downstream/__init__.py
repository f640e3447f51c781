"""What a pre-trained encoder is worth: data, fine-tuning, segmentation, detection."""
