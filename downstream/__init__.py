"""Fine-tuning, linear probing, segmentation and detection of pre-trained encoders, and the tables."""
