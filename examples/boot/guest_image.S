// The zeroing guest, so that cppvmm-boot is one file. ZEROING_IMAGE is its path, as a string.
  .section .rodata
  .balign 16
  .globl cppvmm_zeroing_image
  .hidden cppvmm_zeroing_image
cppvmm_zeroing_image:
  .incbin ZEROING_IMAGE
  .globl cppvmm_zeroing_image_end
  .hidden cppvmm_zeroing_image_end
cppvmm_zeroing_image_end:

  .section .note.GNU-stack, "", @progbits
