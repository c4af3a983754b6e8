// The flat image begins here, on every vCPU: RDI = the BootInfo, RSI = the vCPU's number, RSP = the top of its stack.
  .section .entry, "ax"
  .globl zeroing_entry
zeroing_entry:
  cld
  xorl %ebp, %ebp
  call zeroing_main
1:
  hlt
  jmp 1b

  .section .note.GNU-stack, "", @progbits
