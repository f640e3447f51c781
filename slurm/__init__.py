"""Jobs on a cluster: batch scripts, what they check before submission, and the same through submitit."""
