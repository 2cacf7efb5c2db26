"""What merging methods are worth: fine-tunes of real networks on real data, merged, negated and evaluated."""
