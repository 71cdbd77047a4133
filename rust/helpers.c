// SPDX-License-Identifier: GPL-2.0
/*
 * One-line inlines and operation tables, nothing that decides. See helpers.h.
 */
#include <crypto/chacha.h>
#include <linux/bvec.h>
#include <linux/cred.h>
#include <linux/filelock.h>
#include <linux/io.h>
#include <linux/kthread.h>
#include <linux/lz4.h>
#include <linux/magic.h>
#include <linux/memcontrol.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/namei.h>
#include <linux/pagemap.h>
#include <linux/psi.h>
#include <linux/ratelimit.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/shrinker.h>
#include <linux/siphash.h>
#include <linux/swap.h>
#include <asm/pgalloc.h>
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
#include <asm/invpcid.h>
#endif
#include "helpers.h"

static const struct super_operations thinram_super_ops;

/* Pages. Guest frames count against the cgroup of the task that faults; shared ones are the host's. */
const gfp_t thinram_gfp_guest = GFP_HIGHUSER | __GFP_ACCOUNT | __GFP_NOWARN;
const gfp_t thinram_gfp_guest_zeroed = GFP_HIGHUSER | __GFP_ACCOUNT | __GFP_NOWARN | __GFP_ZERO;
const gfp_t thinram_gfp_returned =
	GFP_HIGHUSER | __GFP_ACCOUNT | __GFP_NORETRY | __GFP_NOWARN;
const gfp_t thinram_gfp_shared = GFP_HIGHUSER | __GFP_NORETRY | __GFP_NOWARN;
const gfp_t thinram_gfp_awaited = GFP_HIGHUSER | __GFP_NOWARN;

/*
 * Objects of a pool can move, nobody waits for memory to compress a page, and reclaim that asks for
 * it does not drain the reserves.
 */
const gfp_t thinram_gfp_pool = GFP_NOWAIT | __GFP_NOWARN | __GFP_NOMEMALLOC | __GFP_HIGHMEM |
			       __GFP_MOVABLE;

static_assert(LZ4_MEM_COMPRESS == THINRAM_LZ4_WORK);

phys_addr_t thinram_virt_to_phys(const void *address)
{
	return virt_to_phys((void *)address);
}

void *thinram_phys_to_virt(phys_addr_t address)
{
	return phys_to_virt(address);
}

bool thinram_is_err(unsigned long value)
{
	return IS_ERR_VALUE(value);
}

struct page *thinram_page_alloc(gfp_t gfp, int nid)
{
	return alloc_pages_node(nid, gfp, 0);
}

struct page *thinram_page_alloc_vma(gfp_t gfp, struct vm_area_struct *vma, unsigned long addr)
{
	struct folio *folio = vma_alloc_folio(gfp, 0, vma, addr);

	return folio ? &folio->page : NULL;
}

struct page *thinram_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

unsigned long thinram_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

void *thinram_page_address(const struct page *page)
{
	return page_address(page);
}

int thinram_page_to_nid(const struct page *page)
{
	return page_to_nid(page);
}

void thinram_page_get(struct page *page)
{
	get_page(page);
}

void thinram_page_put(struct page *page)
{
	put_page(page);
}

int thinram_page_refcount(const struct page *page)
{
	return folio_ref_count(page_folio(page));
}

int thinram_page_mapcount(const struct page *page)
{
	return folio_mapcount(page_folio(page));
}

unsigned long thinram_copy_mc(void *to, const void *from, unsigned int bytes)
{
	return copy_mc_to_kernel(to, from, bytes);
}

bool thinram_page_freeze(struct page *page, int refs)
{
	return folio_ref_freeze(page_folio(page), refs);
}

void thinram_page_unfreeze(struct page *page, int refs)
{
	folio_ref_unfreeze(page_folio(page), refs);
}

bool thinram_page_poisoned(const struct page *page)
{
	return PageHWPoison(page);
}

unsigned long thinram_page_private(const struct page *page)
{
	return page_private(page);
}

void thinram_page_set_private(struct page *page, unsigned long value)
{
	set_page_private(page, value);
}

unsigned long thinram_page_note(const struct page *page)
{
	return page_folio(page)->index;
}

void thinram_page_set_note(struct page *page, unsigned long value)
{
	page_folio(page)->index = value;
}

/* 2 MiB pages. */
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
static const gfp_t thinram_gfp_huge = GFP_HIGHUSER | __GFP_ACCOUNT | __GFP_ZERO | __GFP_NORETRY |
				      __GFP_NOMEMALLOC | __GFP_NOWARN;

struct page *thinram_huge_alloc(int nid)
{
	struct folio *folio = __folio_alloc_node(thinram_gfp_huge,
						 HPAGE_PMD_ORDER,
						 nid < 0 ? numa_mem_id() : nid);

	return folio ? &folio->page : NULL;
}

struct page *thinram_huge_alloc_vma(struct vm_fault *vmf)
{
	struct folio *folio = vma_alloc_folio(thinram_gfp_huge, HPAGE_PMD_ORDER, vmf->vma,
					      vmf->address & HPAGE_PMD_MASK);

	return folio ? &folio->page : NULL;
}

bool thinram_huge_fits(struct vm_fault *vmf)
{
	return thp_vma_suitable_order(vmf->vma, vmf->address, HPAGE_PMD_ORDER);
}

int thinram_huge_middle(struct vm_fault *vmf)
{
	pmd_t pmd = pmdp_get_lockless(vmf->pmd);

	return pmd_none(pmd) ? 0 : pmd_trans_huge(pmd) ? 1 : 2;
}

vm_fault_t thinram_huge_insert(struct vm_fault *vmf, struct page *page, bool write)
{
	return vmf_insert_folio_pmd(vmf, page_folio(page), write);
}
#else
struct page *thinram_huge_alloc(int nid)
{
	return NULL;
}

struct page *thinram_huge_alloc_vma(struct vm_fault *vmf)
{
	return NULL;
}

bool thinram_huge_fits(struct vm_fault *vmf)
{
	return false;
}

int thinram_huge_middle(struct vm_fault *vmf)
{
	return 2;
}

vm_fault_t thinram_huge_insert(struct vm_fault *vmf, struct page *page, bool write)
{
	return VM_FAULT_FALLBACK;
}
#endif

/* Tables of 4 KiB entries. */
bool thinram_table_can_go(const struct vm_fault *vmf)
{
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
#ifdef CONFIG_IOMMU_MM_DATA
	/* Elsewhere no device walks the tables of a process. */
	if (vmf->vma->vm_mm->iommu_mm)
		return false;
#endif
	return !cpu_feature_enabled(X86_FEATURE_XENPV) &&
	       (!cpu_feature_enabled(X86_FEATURE_PCID) ||
		cpu_feature_enabled(X86_FEATURE_INVPCID));
#else
	return false;
#endif
}

spinlock_t *thinram_table_lock_middle(struct vm_fault *vmf)
{
	return pmd_lock(vmf->vma->vm_mm, vmf->pmd);
}

spinlock_t *thinram_table_lock_inner(struct vm_fault *vmf, spinlock_t *middle)
{
	spinlock_t *inner = pte_lockptr(vmf->vma->vm_mm, vmf->pmd);

	if (inner != middle)
		spin_lock_nested(inner, SINGLE_DEPTH_NESTING);
	return inner;
}

void thinram_table_unlock(spinlock_t *lock)
{
	spin_unlock(lock);
}

const unsigned long *thinram_table_entries(const struct vm_fault *vmf)
{
	return (const unsigned long *)pmd_page_vaddr(*vmf->pmd);
}

struct page *thinram_table_page(const struct vm_fault *vmf)
{
	return pmd_pgtable(*vmf->pmd);
}

void thinram_table_clear(struct vm_fault *vmf)
{
	pmd_clear(vmf->pmd);
	mm_dec_nr_ptes(vmf->vma->vm_mm);
}

static void thinram_flush_tlb(void *unused)
{
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
	if (cpu_feature_enabled(X86_FEATURE_PCID))
		invpcid_flush_all_nonglobals();
	else
		native_write_cr3(__native_read_cr3());
#endif
}

void thinram_table_flush(void)
{
	on_each_cpu(thinram_flush_tlb, NULL, 1);
}

static void thinram_table_freed(struct rcu_head *head)
{
	struct ptdesc *table = container_of(head, struct ptdesc, pt_rcu_head);

	pagetable_dtor(table);
	__pagetable_free(table);
}

void thinram_table_free(struct page *table)
{
	call_rcu(&page_ptdesc(table)->pt_rcu_head, thinram_table_freed);
}

bool thinram_page_take_referenced(struct page *page)
{
	return folio_test_clear_referenced(page_folio(page));
}

/* Memory cgroups. */
struct mem_cgroup *thinram_memcg_of_current(void)
{
	return current->mm ? get_mem_cgroup_from_mm(current->mm) : NULL;
}

void thinram_memcg_put(struct mem_cgroup *memcg)
{
	mem_cgroup_put(memcg);
}

struct mem_cgroup *thinram_memcg_charge_to(struct mem_cgroup *memcg)
{
	return set_active_memcg(memcg);
}

/* Swap files. */
int thinram_find_dir(const char *name, struct path *path)
{
	return kern_path(name, LOOKUP_FOLLOW | LOOKUP_DIRECTORY, path);
}

bool thinram_path_is_ours(const struct path *path)
{
	return path->dentry->d_sb->s_op == &thinram_super_ops;
}

bool thinram_path_is_memory(const struct path *path)
{
	unsigned long magic = path->dentry->d_sb->s_magic;

	return magic == TMPFS_MAGIC || magic == RAMFS_MAGIC;
}

struct file *thinram_swap_file(const struct path *dir)
{
	if (!d_inode(dir->dentry)->i_op->tmpfile)
		return ERR_PTR(-EOPNOTSUPP);
	return kernel_tmpfile_open(mnt_idmap(dir->mnt), dir, S_IFREG | 0600,
				   O_RDWR | O_DIRECT | O_LARGEFILE | O_NOATIME, current_cred());
}

void thinram_kiocb_init(struct kiocb *kiocb, struct file *file, loff_t at)
{
	init_sync_kiocb(kiocb, file);
	kiocb->ki_pos = at;
}

void thinram_bvec_set(struct bio_vec *vec, void *address, unsigned int len)
{
	bvec_set_virt(vec, address, len);
}

unsigned int thinram_memalloc_begin(void)
{
	return memalloc_noreclaim_save();
}

void thinram_memalloc_end(unsigned int flags)
{
	memalloc_noreclaim_restore(flags);
}

void thinram_chacha20_block(u32 *state, u8 *out)
{
	chacha20_block((struct chacha_state *)state, out);
}

u64 thinram_siphash(const void *data, size_t len, const u64 *key)
{
	return siphash(data, len, (const siphash_key_t *)key);
}

/* Tasks and time. */
bool thinram_fatal_signal_pending(void)
{
	return fatal_signal_pending(current);
}

void thinram_cond_resched(void)
{
	cond_resched();
}

u64 thinram_thread_cpu_ns(void)
{
	return current->se.sum_exec_runtime;
}

unsigned long thinram_total_pages(void)
{
	return totalram_pages();
}

bool thinram_ratelimit(void)
{
	static DEFINE_RATELIMIT_STATE(limit, 5 * HZ, 20);

	return __ratelimit(&limit);
}

bool thinram_is_kernel_thread(void)
{
	return current->flags & PF_KTHREAD;
}

void thinram_memstall_enter(unsigned long *flags)
{
	psi_memstall_enter(flags);
}

void thinram_memstall_leave(unsigned long *flags)
{
	psi_memstall_leave(flags);
}

int thinram_owner_pid(void)
{
	return task_tgid_nr(current);
}

/* Mappings. */
static vm_fault_t thinram_map_pages(struct vm_fault *vmf, pgoff_t start, pgoff_t end)
{
	/* Maps nothing around the fault; without it, faults would lose the per-VMA lock. */
	return 0;
}

static const struct vm_operations_struct thinram_vm_ops = {
	.open		= thinram_rs_open,
	.close		= thinram_rs_close,
	.mapped		= thinram_rs_mapped,
	.fault		= thinram_rs_fault,
	.huge_fault	= thinram_rs_huge_fault,
	.map_pages	= thinram_map_pages,
	.page_mkwrite	= thinram_rs_page_mkwrite,
};

void thinram_file_accessed(struct file *file)
{
	file_accessed(file);
}

struct file *thinram_vmf_file(struct vm_fault *vmf)
{
	return get_file(vmf->vma->vm_file);
}

void thinram_file_put(struct file *file)
{
	fput(file);
}

void thinram_release_fault_lock(struct vm_fault *vmf)
{
	release_fault_lock(vmf);
}

bool thinram_vma_shared(const struct vm_area_desc *desc)
{
	return vma_desc_test(desc, VMA_MAYSHARE_BIT);
}

void thinram_vma_prepare(struct vm_area_desc *desc)
{
	/* DONTEXPAND also keeps KSM, khugepaged, mlock, MGLRU and userfaultfd away. */
	vma_desc_set_flags(desc, VMA_DONTEXPAND_BIT, VMA_DONTDUMP_BIT, VMA_DONTCOPY_BIT);
	desc->vm_ops = &thinram_vm_ops;
}

bool thinram_vma_read_only(const struct vm_area_struct *vma)
{
	return !(vma->vm_flags & VM_MAYWRITE);
}

struct inode *thinram_vma_inode(const struct vm_area_struct *vma)
{
	return file_inode(vma->vm_file);
}

/* The filesystem. */
static int thinram_file_open(struct inode *inode, struct file *file)
{
	/* As tmpfs: O_DIRECT means nothing here, and is allowed. */
	file->f_mode |= FMODE_CAN_ODIRECT;
	return generic_file_open(inode, file);
}

static const struct file_operations thinram_file_ops = {
	.owner		= THIS_MODULE,
	.open		= thinram_file_open,
	.llseek		= thinram_rs_llseek,
	.read_iter	= thinram_rs_read_iter,
	.write_iter	= thinram_rs_write_iter,
	.fallocate	= thinram_rs_fallocate,
	.mmap_prepare	= thinram_rs_mmap_prepare,
	.get_unmapped_area = thp_get_unmapped_area,
	.fsync		= noop_fsync,
	.setlease	= generic_setlease,
	.splice_read	= copy_splice_read,
	.splice_write	= iter_file_splice_write,
};

/* A program is mapped private, which is refused: too late for execve(2) to fail, it would kill. */
static int thinram_permission(struct mnt_idmap *idmap, struct inode *inode, int mask)
{
	return mask & MAY_EXEC ? -EACCES : generic_permission(idmap, inode, mask);
}

static const struct inode_operations thinram_file_inode_ops = {
	.permission	= thinram_permission,
	.setattr	= thinram_rs_setattr,
	.getattr	= thinram_rs_getattr,
};

static const struct inode_operations thinram_dir_inode_ops = {
	.create		= thinram_rs_create,
	.lookup		= simple_lookup,
	.link		= thinram_rs_link,
	.unlink		= simple_unlink,
	.mkdir		= thinram_rs_mkdir,
	.rmdir		= simple_rmdir,
	.rename		= thinram_rs_rename,
	.tmpfile	= thinram_rs_tmpfile,
};

static const struct address_space_operations thinram_aops = {
	.dirty_folio	= noop_dirty_folio,
};

void thinram_inode_setup_file(struct inode *inode)
{
	inode->i_op = &thinram_file_inode_ops;
	inode->i_fop = &thinram_file_ops;
	inode->i_mapping->a_ops = &thinram_aops;
	/* A trick: vma_migratable() takes __GFP_DMA for "not movable", so NUMA balancing stays off. */
	mapping_set_gfp_mask(inode->i_mapping, GFP_USER | __GFP_DMA);
	mapping_set_unevictable(inode->i_mapping);
}

void thinram_inode_setup_dir(struct inode *inode)
{
	inode->i_op = &thinram_dir_inode_ops;
	inode->i_fop = &simple_dir_operations;
	inc_nlink(inode);
}

void thinram_inode_stamp(struct inode *inode)
{
	inode_set_mtime_to_ts(inode, inode_set_ctime_current(inode));
}

void thinram_inode_lock(struct inode *inode)
{
	inode_lock(inode);
}

void thinram_inode_unlock(struct inode *inode)
{
	inode_unlock(inode);
}

loff_t thinram_i_size_read(const struct inode *inode)
{
	return i_size_read(inode);
}

void thinram_i_size_write(struct inode *inode, loff_t size)
{
	i_size_write(inode, size);
}

static const struct super_operations thinram_super_ops = {
	.statfs		= thinram_rs_statfs,
	.drop_inode	= inode_just_drop,
	.evict_inode	= thinram_rs_evict_inode,
	.show_options	= thinram_rs_show_options,
};

void thinram_sb_setup(struct super_block *sb)
{
	sb->s_op = &thinram_super_ops;
	sb->s_d_flags = DCACHE_DONTCACHE;
	sb->s_time_gran = 1;
}

/* The order is that of `Opt` in rust/glue/mount.rs. */
enum { OPT_SIZE, OPT_MODE, OPT_UID, OPT_GID, OPT_DOMAIN, OPT_SHARE, OPT_SCAN_PAGES,
       OPT_LARGE_PAGES, OPT_SWAP_DIR };

static const struct fs_parameter_spec thinram_parameters[] = {
	fsparam_string("size", OPT_SIZE),
	fsparam_u32oct("mode", OPT_MODE),
	fsparam_uid("uid", OPT_UID),
	fsparam_gid("gid", OPT_GID),
	fsparam_string("domain", OPT_DOMAIN),
	fsparam_bool("share", OPT_SHARE),
	fsparam_string("scan_pages_per_sec", OPT_SCAN_PAGES),
	fsparam_string("large_pages", OPT_LARGE_PAGES),
	fsparam_string("swap_dir", OPT_SWAP_DIR),
	{}
};

int thinram_fs_parse(struct fs_context *fc, struct fs_parameter *param,
		     struct fs_parse_result *result)
{
	return fs_parse(fc, thinram_parameters, param, result);
}

u32 thinram_result_u32(const struct fs_parse_result *result)
{
	return result->uint_32;
}

bool thinram_result_bool(const struct fs_parse_result *result)
{
	return result->boolean;
}

kuid_t thinram_result_uid(const struct fs_parse_result *result)
{
	return result->uid;
}

kgid_t thinram_result_gid(const struct fs_parse_result *result)
{
	return result->gid;
}

void *thinram_fc_options(const struct fs_context *fc)
{
	return fc->fs_private;
}

struct super_block *thinram_fc_super(const struct fs_context *fc)
{
	return fc->root->d_sb;
}

void thinram_fc_error(struct fs_context *fc, const char *what)
{
	errorf(fc, "thinram: %s", what);
}

const char *thinram_param_string(const struct fs_parameter *param)
{
	return param->type == fs_value_is_string ? param->string : NULL;
}

const unsigned char *thinram_dentry_name(const struct dentry *dentry)
{
	return dentry->d_name.name;
}

unsigned int thinram_dentry_name_len(const struct dentry *dentry)
{
	return dentry->d_name.len;
}

bool thinram_is_dir(const struct inode *inode)
{
	return S_ISDIR(inode->i_mode);
}

bool thinram_file_read_only(const struct file *file)
{
	return !(file->f_mode & FMODE_WRITE);
}

struct inode *thinram_file_inode(const struct file *file)
{
	return file_inode(file);
}

size_t thinram_iter_count(const struct iov_iter *iter)
{
	return iov_iter_count(iter);
}

int thinram_finish_tmpfile(struct file *file, int error)
{
	return finish_open_simple(file, error);
}

void thinram_statfs_set(struct kstatfs *buf, u64 blocks, u64 free)
{
	buf->f_blocks = blocks;
	buf->f_bfree = buf->f_bavail = free;
}

void thinram_sb_option(struct seq_file *m, const char *name, const char *value)
{
	seq_show_option(m, name, value);
}

static const struct fs_context_operations thinram_context_ops = {
	.free		= thinram_rs_free_fc,
	.parse_param	= thinram_rs_parse_param,
	.get_tree	= thinram_rs_get_tree,
	.reconfigure	= thinram_rs_reconfigure,
};

void thinram_fc_setup(struct fs_context *fc, void *options)
{
	fc->fs_private = options;
	fc->ops = &thinram_context_ops;
}

static struct file_system_type thinram_fs_type = {
	.owner			= THIS_MODULE,
	.name			= "thinram",
	.init_fs_context	= thinram_rs_init_fs_context,
	.parameters		= thinram_parameters,
	.kill_sb		= thinram_rs_kill_sb,
};

int thinram_register_fs(void)
{
	return register_filesystem(&thinram_fs_type);
}

void thinram_unregister_fs(void)
{
	unregister_filesystem(&thinram_fs_type);
}

/* The shrinker. */
static unsigned long thinram_shrinker_count(struct shrinker *shrinker, struct shrink_control *sc)
{
	return thinram_rs_shrinker_count(shrinker->private_data);
}

static unsigned long thinram_shrinker_scan(struct shrinker *shrinker, struct shrink_control *sc)
{
	return thinram_rs_shrinker_scan(shrinker->private_data, sc->nr_to_scan);
}

struct shrinker *thinram_shrinker_register(void *data)
{
	struct shrinker *shrinker = shrinker_alloc(0, "thinram");

	if (!shrinker)
		return NULL;
	shrinker->count_objects = thinram_shrinker_count;
	shrinker->scan_objects = thinram_shrinker_scan;
	shrinker->private_data = data;
	shrinker_register(shrinker);
	return shrinker;
}

void thinram_account_reclaimed(unsigned long pages)
{
	mm_account_reclaimed_pages(pages);
}

/* sysfs. */
static const struct sysfs_ops thinram_sysfs_ops = {
	.show	= thinram_rs_sysfs_show,
	.store	= thinram_rs_sysfs_store,
};

static const struct kobj_type thinram_ktype = {
	.sysfs_ops	= &thinram_sysfs_ops,
	.release	= thinram_rs_sysfs_release,
};

struct kobject *thinram_fs_kobj(void)
{
	return fs_kobj;
}

int thinram_kobject_add(struct kobject *kobj, struct kobject *parent, const char *name)
{
	return kobject_init_and_add(kobj, &thinram_ktype, parent, "%s", name);
}
