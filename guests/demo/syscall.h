/* System calls: number in RAX, arguments in RDI, RSI, RDX, result in RAX; RCX and R11 are lost. */
#ifndef SYSCALL_H
#define SYSCALL_H
#define SYS_OPEN 0 /* path, flags */
#define SYS_READ 1 /* fd, buffer, n */
#define SYS_WRITE 2 /* fd, buffer, n */
#define SYS_CLOSE 3 /* fd */
#define SYS_LICENCE 4 /* key */
#define SYS_SPAWN 5 /* path */
#define SYS_SEND 6 /* address, buffer, n */
#define SYS_NEXT_ROUND 7 /* the round that is done (0 at first); waits for the next and gives its number */
#define SYS_TRAPS 8 /* how many INT3s of this task were handled */
#define SYS_LICENCE_RESULT 9 /* 1 or 0: what the program believes */
#define SYS_EXIT 10
#define SYS_LIMIT 256 /* most bytes of one read, write, send or path */
#endif
