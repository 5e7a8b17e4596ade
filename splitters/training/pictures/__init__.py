"""What a training looks at: photographs and clips, decoded once, cropped and disturbed at random."""
